//! Messages of weights on their way.

use super::ConvertError;
use crate::grpc::v1;
use crate::{SharedUnit, SharedWeights};

same_fields!(SharedUnit, v1::SharedUnit, unit => { start, len, offset_bytes });

same_fields!(SharedWeights, v1::SharedWeights, weights => { process_id, descriptor }
to {
    nonce: weights.nonce.to_vec(),
    units: weights.units.into_iter().map(Into::into).collect(),
}
try_from {
    nonce: nonce(&weights.nonce)?,
    units: weights.units.into_iter().map(Into::into).collect(),
});

fn nonce(bytes: &[u8]) -> Result<[u8; 16], ConvertError> {
    bytes.try_into().map_err(|_| ConvertError::new("nonce", "16 bytes", bytes.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nonce_of_another_length_is_refused() {
        let wire = v1::SharedWeights { nonce: vec![1; 15], ..v1::SharedWeights::default() };
        let error = SharedWeights::try_from(wire).expect_err("15 bytes");
        assert_eq!(error, ConvertError::new("nonce", "16 bytes", 15));
    }
}
