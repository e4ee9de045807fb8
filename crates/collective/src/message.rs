//! What travels between two ranks.

use std::ops::AddAssign;

/// An operation, as errors and counters name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operation {
    /// Everyone gets everyone's part.
    AllGather,
    /// Everyone gets one part of the sum.
    ReduceScatter,
    /// Everyone gets the whole sum.
    AllReduce,
    /// Everyone gets what one rank has.
    Broadcast,
    /// Everyone waits for everyone.
    Barrier,
    /// One rank to another.
    PointToPoint,
    /// Everyone gives everyone a part of its own.
    AllToAll,
    /// One rank to another, beside what the ranks compute: copies of state.
    Mirror,
}

impl Operation {
    /// All of them.
    pub const ALL: [Operation; 8] = [
        Operation::AllGather,
        Operation::ReduceScatter,
        Operation::AllReduce,
        Operation::Broadcast,
        Operation::Barrier,
        Operation::PointToPoint,
        Operation::AllToAll,
        Operation::Mirror,
    ];

    /// Its name, as in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Operation::AllGather => "all_gather",
            Operation::ReduceScatter => "reduce_scatter",
            Operation::AllReduce => "all_reduce",
            Operation::Broadcast => "broadcast",
            Operation::Barrier => "barrier",
            Operation::PointToPoint => "point_to_point",
            Operation::AllToAll => "all_to_all",
            Operation::Mirror => "mirror",
        }
    }

    pub(crate) fn code(self) -> u8 {
        self as u8
    }

    pub(crate) fn from_code(code: u8) -> Option<Self> {
        Operation::ALL.get(usize::from(code)).copied()
    }
}

impl std::fmt::Display for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Values of one type.
#[derive(Debug, Clone, PartialEq)]
pub enum Payload {
    /// f32.
    F32(Vec<f32>),
    /// f64.
    F64(Vec<f64>),
    /// Bytes.
    Bytes(Vec<u8>),
}

impl Payload {
    pub(crate) fn num_bytes(&self) -> usize {
        match self {
            Payload::F32(values) => values.len() * size_of::<f32>(),
            Payload::F64(values) => values.len() * size_of::<f64>(),
            Payload::Bytes(values) => values.len(),
        }
    }

    pub(crate) fn describe(&self) -> String {
        match self {
            Payload::F32(values) => format!("{} x f32", values.len()),
            Payload::F64(values) => format!("{} x f64", values.len()),
            Payload::Bytes(values) => format!("{} bytes", values.len()),
        }
    }
}

/// Where in its group's sequence a message belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// Number of the operation in its group, from 0.
    pub sequence: u64,
    /// The operation.
    pub operation: Operation,
}

/// What one rank sends another.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Message {
    /// Part of an operation of a group.
    Data {
        /// The group.
        group: u64,
        /// Where it belongs.
        place: Place,
        /// The values.
        payload: Payload,
    },
    /// A rank was lost: nobody can go on.
    Abort {
        /// The lost rank.
        rank: usize,
        /// In which operation.
        operation: Operation,
    },
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
    impl Sealed for u8 {}
}

/// What can be sent.
pub trait Element: Copy + Default + Send + sealed::Sealed + 'static {
    /// As a payload.
    #[doc(hidden)]
    fn wrap(values: Vec<Self>) -> Payload;
    /// Out of a payload of this type.
    #[doc(hidden)]
    fn unwrap(payload: Payload) -> Result<Vec<Self>, Payload>;
}

/// What can be added up.
pub trait Sum: Element + AddAssign {}

macro_rules! element {
    ($type:ty, $variant:ident) => {
        impl Element for $type {
            fn wrap(values: Vec<Self>) -> Payload {
                Payload::$variant(values)
            }

            fn unwrap(payload: Payload) -> Result<Vec<Self>, Payload> {
                match payload {
                    Payload::$variant(values) => Ok(values),
                    other => Err(other),
                }
            }
        }
    };
}

element!(f32, F32);
element!(f64, F64);
element!(u8, Bytes);
impl Sum for f32 {}
impl Sum for f64 {}
