//! Writes lines on a thread of its own, so that a slow or dead reader of the output never holds up the monitor: lines
//! that do not fit the queue are counted as lost.

use std::{
    io::{self, Write},
    sync::mpsc::{self, SyncSender, TrySendError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::sync::oneshot;

use crate::sandbox;

/// Lines that wait to be written.
const QUEUE: usize = 4096;

/// The writing end.
#[derive(Debug)]
pub struct Writer {
    queue: Option<SyncSender<Bytes>>,
    thread: Option<JoinHandle<()>>,
    /// Lines that were not written.
    pub lost: u64,
}

/// Resolves when the output can no longer be written to, with what the system said.
pub type Broken = oneshot::Receiver<io::Error>;

impl Writer {
    /// Starts writing to `output`.
    pub fn start(mut output: Box<dyn Write + Send>) -> io::Result<(Self, Broken)> {
        let (queue, lines) = mpsc::sync_channel::<Bytes>(QUEUE);
        let (broken, is_broken) = oneshot::channel();
        let thread = std::thread::Builder::new().name("output".into()).spawn(move || {
            sandbox::keep_nothing("output");
            let mut write = || -> io::Result<()> {
                while let Ok(line) = lines.recv() {
                    output.write_all(&line)?;
                    // What has come meanwhile goes out with it.
                    while let Ok(line) = lines.try_recv() {
                        output.write_all(&line)?;
                    }
                    output.flush()?;
                }
                Ok(())
            };
            if let Err(error) = write() {
                // Nobody listens when the program is ending anyway.
                let _ = broken.send(error);
            }
        })?;
        Ok((Self { queue: Some(queue), thread: Some(thread), lost: 0 }, is_broken))
    }

    /// Writes a line; whether it could be taken.
    pub fn line(&mut self, line: String) -> bool {
        self.put(ended(line))
    }

    /// Writes bytes, all or none; whether they could be taken.
    pub fn put(&mut self, bytes: Bytes) -> bool {
        let taken = match &self.queue {
            Some(queue) => match queue.try_send(bytes) {
                Ok(()) => true,
                Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => false,
            },
            None => false,
        };
        self.lost += u64::from(!taken);
        taken
    }

    /// Writes a last line, waiting for room, and ends; gives up on a reader that takes nothing for `patience`.
    pub fn finish(mut self, line: Option<String>, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let Some(queue) = self.queue.take() else {
            return false;
        };
        let mut pending = line.map(ended);
        while let Some(line) = pending.take() {
            match queue.try_send(line) {
                Ok(()) => {}
                Err(TrySendError::Full(line)) if Instant::now() < until => {
                    pending = Some(line);
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => return false,
            }
        }
        drop(queue);
        let Some(thread) = self.thread.take() else {
            return false;
        };
        while !thread.is_finished() {
            if Instant::now() >= until {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        thread.join().is_ok()
    }
}

/// A line with its end, in a form that several readers can share.
fn ended(mut line: String) -> Bytes {
    line.push('\n');
    Bytes::from(line)
}
