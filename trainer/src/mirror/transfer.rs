//! How a copy comes to the rank that mirrors it: its manifest, then what that rank does not have yet.

use super::copy::{Manifest, Part, PartInfo, ShardCopy};
use crate::Error;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use temper_collective::Collective;

/// Values of one message.
const PIECE: usize = 1 << 20;

/// What comes before the values.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    manifest: Manifest,
    /// Names of the parts that follow, in this order.
    sent: Vec<String>,
}

/// The other rank of a group of two.
fn other(link: &Collective) -> usize {
    1 - link.rank()
}

/// Send a copy to the other end of `link`, which has `known`.
pub(super) fn send(link: &Collective, copy: &ShardCopy, known: Option<&ShardCopy>) -> Result<(), Error> {
    let is_new = |(name, info): &(&String, &PartInfo)| known.is_none_or(|known| known.find(name, info).is_none());
    let sent: Vec<String> = copy.manifest.parts.iter().filter(is_new).map(|(name, _)| name.clone()).collect();
    let header = Header { manifest: copy.manifest.clone(), sent };
    link.give_to(other(link), serde_json::to_vec(&header).expect("a header is plain data"))?;
    for part in header.sent.iter().filter_map(|name| copy.parts.get(name)) {
        part.values.chunks(PIECE).try_for_each(|piece| link.give_to(other(link), piece.to_vec()))?;
    }
    Ok(())
}

/// What the other end of `link` sends; this end has `known`.
pub(super) fn receive(link: &Collective, known: Option<&ShardCopy>) -> Result<ShardCopy, Error> {
    let wrong = |problem: String| Error::Mirror { problem };
    let header: Vec<u8> = link.take_from(other(link))?;
    let Header { manifest, sent } =
        serde_json::from_slice(&header).map_err(|e| wrong(format!("the header of a shard: {e}")))?;
    let mut parts = BTreeMap::new();
    for name in sent {
        let unnamed = || wrong(format!("`{name}` comes with a shard that does not name it"));
        let len = manifest.parts.get(&name).ok_or_else(unnamed)?.len;
        let mut values: Vec<f32> = Vec::with_capacity(len);
        while values.len() < len {
            values.extend(link.take_from::<f32>(other(link))?);
        }
        parts.insert(name, Part::new(Arc::new(values)));
    }
    for (name, info) in &manifest.parts {
        if let (false, Some(part)) = (parts.contains_key(name), known.and_then(|known| known.find(name, info))) {
            parts.insert(name.clone(), part.clone());
        }
    }
    ShardCopy::new(manifest, parts)
}
