//! Which weights: a number and a content hash.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// 128 bits of a hash over canonical tensors.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct ContentHash(pub [u8; 16]);

impl fmt::Display for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ContentHash({self})")
    }
}

/// The weights at one point of a run: how many updates they have seen, and what they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct PolicyVersion {
    /// Number of weight publications before this one.
    pub number: u64,
    /// Hash of the canonical tensors.
    pub hash: ContentHash,
}

impl fmt::Display for PolicyVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.number, self.hash)
    }
}

/// A text that is no version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no policy version: expected NUMBER-HASH with 32 hexadecimal digits")]
pub struct ParseVersionError(String);

impl FromStr for PolicyVersion {
    type Err = ParseVersionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fail = || ParseVersionError(text.to_owned());
        let (number, hex) = text.split_once('-').ok_or_else(fail)?;
        let number = number.parse().map_err(|_| fail())?;
        if hex.len() != 32 || !hex.is_ascii() {
            return Err(fail());
        }
        let mut hash = [0u8; 16];
        for (byte, pair) in hash.iter_mut().zip(0..16) {
            *byte = u8::from_str_radix(&hex[2 * pair..2 * pair + 2], 16).map_err(|_| fail())?;
        }
        Ok(PolicyVersion { number, hash: ContentHash(hash) })
    }
}

impl Serialize for PolicyVersion {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PolicyVersion {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_survives_text() {
        let version = PolicyVersion { number: 12, hash: ContentHash([0xab; 16]) };
        assert_eq!(version.to_string().parse(), Ok(version));
        assert!("12-ab".parse::<PolicyVersion>().is_err());
    }
}
