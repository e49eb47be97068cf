//! Reading from a slow neighbour in a pipe without being deaf to signals: a blocking read would go on until its next row.

use std::io::{self, BufRead, Read};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

use crate::program;

/// A reader behind a thread of its own. Once a signal has come (see [`program::check`]) waiting for it fails.
pub struct Patient {
    chunks: Receiver<io::Result<Vec<u8>>>,
    chunk: Vec<u8>,
    taken: usize,
}

impl Patient {
    /// Reads what `open` opens in that thread.
    pub fn start<R: BufRead>(open: impl FnOnce() -> R + Send + 'static) -> Self {
        let (sender, chunks) = sync_channel(4);
        std::thread::spawn(move || {
            let mut from = open();
            loop {
                let chunk = from.fill_buf().map(<[u8]>::to_vec);
                match &chunk {
                    Ok(bytes) if bytes.is_empty() => return,
                    Ok(bytes) => from.consume(bytes.len()),
                    Err(err) if err.kind() == io::ErrorKind::Interrupted => continue,
                    Err(_) => {}
                }
                let failed = chunk.is_err();
                if sender.send(chunk).is_err() || failed {
                    return;
                }
            }
        });
        Self {
            chunks,
            chunk: Vec::new(),
            taken: 0,
        }
    }
}

impl Read for Patient {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.taken == self.chunk.len() {
            match self.chunks.recv_timeout(Duration::from_millis(50)) {
                Ok(chunk) => (self.chunk, self.taken) = (chunk?, 0),
                Err(RecvTimeoutError::Disconnected) => return Ok(0),
                Err(RecvTimeoutError::Timeout) => {
                    program::check().map_err(io::Error::other)?;
                }
            }
        }
        let n = into.len().min(self.chunk.len() - self.taken);
        into[..n].copy_from_slice(&self.chunk[self.taken..self.taken + n]);
        self.taken += n;
        Ok(n)
    }
}
