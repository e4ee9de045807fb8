//! The threads that move messages. No compute runs on them.

use super::Tls;
use std::sync::Arc;
use tokio::runtime::{Builder, Handle, Runtime};

/// A tokio runtime for transport, shared by the clients and servers of a process.
#[derive(Debug, Clone)]
pub struct GrpcRuntime {
    inner: Arc<Owned>,
    tls: Option<Arc<Tls>>,
}

#[derive(Debug)]
struct Owned(Option<Runtime>);

/// Ends without waiting for calls that are under way.
impl Drop for Owned {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl GrpcRuntime {
    /// Start the runtime: two threads for messages, and more for blocking services as calls come.
    ///
    /// # Errors
    /// Where the system gives no thread.
    pub fn start() -> std::io::Result<Self> {
        let runtime = Builder::new_multi_thread().worker_threads(2).thread_name("grpc").enable_all().build()?;
        Ok(GrpcRuntime { inner: Arc::new(Owned(Some(runtime))), tls: None })
    }

    /// Put every connection that is made or taken from here on under TLS; in plain text where there is none.
    #[must_use]
    pub fn with_tls(mut self, tls: Option<Tls>) -> Self {
        self.tls = tls.map(Arc::new);
        self
    }

    /// The certificates, where connections are under TLS.
    pub fn tls(&self) -> Option<&Arc<Tls>> {
        self.tls.as_ref()
    }

    /// Where futures run; `None` only while the runtime ends.
    pub(crate) fn handle(&self) -> Option<&Handle> {
        self.inner.0.as_ref().map(Runtime::handle)
    }
}
