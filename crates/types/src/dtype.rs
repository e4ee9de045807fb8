//! Number formats of compute and storage.

use serde::{Deserialize, Serialize};

/// Number format in which matrices are multiplied and keys and values are cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// bfloat16, accumulated in f32.
    Bf16,
}

impl DType {
    /// Size of one element in bytes.
    pub const fn size_bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::Bf16 => 2,
        }
    }

    /// Lower-case name as it stands in recipes and flags.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A dtype as a user asks for it: `auto` is resolved once, at start, by the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DTypeChoice {
    /// bf16 where the device multiplies it natively, else f32.
    #[default]
    Auto,
    /// Always f32.
    F32,
    /// Always bf16.
    Bf16,
}

impl DTypeChoice {
    /// Resolve against what the device multiplies natively.
    pub const fn resolve(self, native_bf16: bool) -> DType {
        match self {
            DTypeChoice::F32 => DType::F32,
            DTypeChoice::Bf16 => DType::Bf16,
            DTypeChoice::Auto => {
                if native_bf16 {
                    DType::Bf16
                } else {
                    DType::F32
                }
            }
        }
    }
}

impl From<DType> for DTypeChoice {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => DTypeChoice::F32,
            DType::Bf16 => DTypeChoice::Bf16,
        }
    }
}
