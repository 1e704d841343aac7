//! The live log: a Unix socket that `vxmon tail` reads from. A reader says in one line of JSON what it wants
//! ([`Request`]), gets the recent lines and then each new one. One that says nothing gets everything as JSON, so that
//! `socat - UNIX:/run/vxmon/vxmon.sock` works too. What readers do, or fail to do, never reaches the monitor: this runs on
//! a thread of its own.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{
            fs::{FileTypeExt, MetadataExt, PermissionsExt, chown},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket},
        stat::{Mode, fchmod},
    },
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::Semaphore,
};

use super::{
    Format,
    feed::{Feed, KEPT, Next, Reader},
    filter::Filter,
    render,
};
use crate::{
    clock,
    event::{Line, Missed, Record},
};

/// Where `vxmon tail` looks, and `attach --socket` without a path listens.
pub const DEFAULT_PATH: &str = "/run/vxmon/vxmon.sock";

/// Readers at a time.
pub const MAX_READERS: usize = 64;
/// The longest request, bytes.
const MAX_REQUEST: usize = 16 * 1024;
/// How long a reader has to say what it wants, before it gets everything.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often it is looked whether a reader to which there is nothing to say has gone.
const LOOK: Duration = Duration::from_secs(5);
/// How long another vxmon that is just starting on the same path is waited for.
const STARTING: Duration = Duration::from_secs(2);

/// What a reader wants: one line of JSON, the first that it sends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Request {
    /// How lines are written.
    pub format: Format,
    /// How many of the recent lines come first; null: all that are kept.
    pub lines: Option<usize>,
    /// Whether to go on with new lines.
    pub wait: bool,
    /// Which lines.
    pub filter: Filter,
}

impl Default for Request {
    fn default() -> Self {
        Self { format: Format::Json, lines: None, wait: true, filter: Filter::default() }
    }
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another process listens.
    #[error("another vxmon is listening on {}: end it, or give this one a path of its own (--socket PATH)", .0.display())]
    InUse(PathBuf),
    /// Something else is at the path. It is left alone.
    #[error("{} exists and is not a socket; it is left as it is: remove it, or give another path (--socket PATH)", .0.display())]
    NotASocket(PathBuf),
    /// Another process holds the lock for long.
    #[error("another vxmon has been starting on {} for {} s: try again", .0.display(), STARTING.as_secs())]
    Starting(PathBuf),
    /// No group of that name.
    #[error("no group `{0}` in /etc/group: give its name or number (--socket-group GROUP)")]
    NoGroup(String),
    /// A system call failed.
    #[error("cannot {what} {}: {source}", path.display())]
    System {
        /// What was tried, as an infinitive.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A socket that listens. Dropping it removes its file, unless that has become another's meanwhile.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file.
    file: (u64, u64),
}

impl Socket {
    /// Listens at `path`, mode 0600, or 0660 for `group`. A socket file that nobody listens on is replaced, anything else
    /// is left alone.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn listen(path: &Path, group: Option<&str>) -> Result<Self, SocketError> {
        let system = |what| {
            let path = path.to_owned();
            move |source: io::Error| SocketError::System { what, path, source }
        };
        let group = group.map(group_id).transpose()?;
        // A path without a directory is one in the current directory.
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if !directory.exists() {
            fs::create_dir(directory).map_err(|source| SocketError::System {
                what: "make the directory",
                path: directory.to_owned(),
                source,
            })?;
        }
        // Two that start at once must not both find a file that nobody listens on. The directory is what both can lock
        // without leaving a file behind.
        let _lock = lock(directory, path)?;
        make_room(path)?;
        let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)
            .map_err(|error| system("open a socket for")(error.into()))?;
        // The file gets the socket's mode, less the umask (unix_bind_bsd(), net/unix/af_unix.c): no moment in which others
        // can connect.
        fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR).map_err(|error| system("set the mode of")(error.into()))?;
        let address = UnixAddr::new(path).map_err(|error| system("listen on")(error.into()))?;
        bind(fd.as_raw_fd(), &address).map_err(|error| system("listen on")(error.into()))?;
        let ready = Self::made(fd, path, group);
        if ready.is_err() {
            let _ = fs::remove_file(path);
        }
        ready
    }

    fn made(fd: OwnedFd, path: &Path, group: Option<u32>) -> Result<Self, SocketError> {
        let system = |what, source| SocketError::System { what, path: path.to_owned(), source };
        if let Some(group) = group {
            chown(path, None, Some(group)).map_err(|error| system("give to that group", error))?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o660))
                .map_err(|error| system("set the mode of", error))?;
        }
        Backlog::new(128)
            .and_then(|backlog| listen(&fd, backlog))
            .map_err(|error| system("listen on", error.into()))?;
        let file = identity(path).map_err(|error| system("look at", error))?;
        Ok(Self { listener: UnixListener::from(fd), path: path.to_owned(), file })
    }

    /// The path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|file| file == self.file) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Locks the directory as long as the returned value lives.
fn lock(directory: &Path, path: &Path) -> Result<Flock<File>, SocketError> {
    let failed = |source| SocketError::System { what: "lock", path: directory.to_owned(), source };
    let mut file = File::open(directory).map_err(failed)?;
    let until = Instant::now() + STARTING;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, Errno::EWOULDBLOCK)) if Instant::now() < until => {
                file = back;
                std::thread::sleep(Duration::from_millis(10));
            }
            Err((_, Errno::EWOULDBLOCK)) => return Err(SocketError::Starting(path.to_owned())),
            Err((_, error)) => return Err(failed(error.into())),
        }
    }
}

/// Removes a socket that nobody listens on.
fn make_room(path: &Path) -> Result<(), SocketError> {
    let system = |what, source| SocketError::System { what, path: path.to_owned(), source };
    // Not followed: a symbolic link is not a socket of ours.
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(system("look at", error)),
        Ok(metadata) if !metadata.file_type().is_socket() => return Err(SocketError::NotASocket(path.to_owned())),
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        // Nobody listens: left over from a process that was killed.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|error| system("remove the stale socket", error))
        }
        // Also where it has no room for one more connection, or is a socket of another type.
        Ok(_) | Err(_) => Err(SocketError::InUse(path.to_owned())),
    }
}

/// A group's number. From /etc/group alone: a static program has no other source.
fn group_id(name: &str) -> Result<u32, SocketError> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    let entry =
        groups.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| fields.first() == Some(&name));
    entry.and_then(|fields| fields.get(2)?.parse().ok()).ok_or_else(|| SocketError::NoGroup(name.to_owned()))
}

/// How many readers there are, and were.
#[derive(Debug, Default)]
pub struct Readers {
    counts: std::sync::Mutex<Counts>,
}

/// Counts of readers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Connected now.
    pub connected: u64,
    /// Turned away, there being too many.
    pub refused: u64,
    /// Lines that readers missed, together.
    pub missed: u64,
}

impl Readers {
    /// The counts.
    pub fn counts(&self) -> Counts {
        *self.lock()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// One more reader, as long as it lives.
struct Connected(Arc<Readers>);

impl Connected {
    fn new(readers: &Arc<Readers>) -> Self {
        readers.lock().connected += 1;
        Self(Arc::clone(readers))
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.lock().connected -= 1;
    }
}

/// What all readers of a socket share.
#[derive(Clone, Debug)]
pub struct Shared {
    /// The lines.
    pub feed: Arc<Feed>,
    /// Their counts.
    pub readers: Arc<Readers>,
    /// Host name of the node.
    pub node: Arc<str>,
}

/// Accepts readers until `done`; then waits until each has got what there is.
pub async fn serve(socket: &Socket, shared: Shared, done: impl Future<Output = ()>) -> io::Result<()> {
    let listener = tokio::net::UnixListener::from_std(socket.listener.try_clone()?)?;
    let room = Arc::new(Semaphore::new(MAX_READERS));
    let mut readers = tokio::task::JoinSet::new();
    tokio::pin!(done);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = readers.join_next() => continue,
            () = &mut done => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // No descriptor left, for instance: the next moment may be better.
                log::debug!("cannot accept a reader: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        match Arc::clone(&room).try_acquire_owned() {
            Ok(permit) => {
                let (shared, connected) = (shared.clone(), Connected::new(&shared.readers));
                readers.spawn(async move {
                    if let Err(error) = reader(stream, &shared).await {
                        log::debug!("a reader of the socket left: {error}");
                    }
                    drop((connected, permit));
                });
            }
            Err(_) => {
                shared.readers.lock().refused += 1;
                // Into the empty buffer of a new connection; it never waits.
                let _ = stream.try_write(refusal(&format!("{MAX_READERS} readers are connected already")).as_bytes());
            }
        }
    }
    while readers.join_next().await.is_some() {}
    Ok(())
}

/// The line that a reader gets in place of events, where it gets none.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refusal {
    /// Why.
    pub error: String,
}

fn refusal(error: &str) -> String {
    let line = serde_json::to_string(&Refusal { error: error.to_owned() });
    line.unwrap_or_default() + "\n"
}

/// Serves one reader to its end.
async fn reader(mut stream: tokio::net::UnixStream, shared: &Shared) -> io::Result<()> {
    let mut said = Vec::new();
    if let Ok(gone) = tokio::time::timeout(PATIENCE, first_line(&mut stream, &mut said)).await {
        gone?;
    }
    let request = match parse(&said) {
        Ok(request) => request,
        Err(why) => return stream.write_all(refusal(&why).as_bytes()).await,
    };
    let mut lines = shared.feed.reader(request.lines.unwrap_or(KEPT));
    loop {
        match lines.take() {
            Next::Lines(batch) => {
                let passing = batch.iter().filter(|entry| request.filter.passes(&entry.line));
                let mut bytes = Vec::new();
                passing.for_each(|entry| bytes.extend_from_slice(entry.rendered(request.format)));
                stream.write_all(&bytes).await?;
            }
            Next::Missed(lines) => {
                shared.readers.lock().missed += lines;
                let missed = Missed { ts: clock::now(), node: shared.node.to_string(), lines };
                let line = render(request.format, &Line::from(Record::Missed(missed))) + "\n";
                stream.write_all(line.as_bytes()).await?;
            }
            Next::Nothing if !request.wait => return Ok(()),
            Next::Nothing => wait(&mut lines, &stream).await?,
            Next::End => return Ok(()),
        }
    }
}

/// Waits for more lines; fails when the reader has gone.
async fn wait(lines: &mut Reader, stream: &tokio::net::UnixStream) -> io::Result<()> {
    while tokio::time::timeout(LOOK, lines.changed()).await.is_err() {
        // A reader that only sends no more is still there. What it sends after its request stays unread.
        let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::ZERO)?;
        if fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP)) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
    }
    Ok(())
}

/// Reads the first line, or as much of it as is ever sent.
async fn first_line(stream: &mut tokio::net::UnixStream, said: &mut Vec<u8>) -> io::Result<()> {
    while !said.contains(&b'\n') && said.len() <= MAX_REQUEST {
        let mut part = [0; 1024];
        let length = stream.read(&mut part).await?;
        if length == 0 {
            break;
        }
        said.extend_from_slice(part.get(..length).unwrap_or_default());
    }
    Ok(())
}

/// Reads what a reader said; nothing, or an empty line, asks for everything.
fn parse(said: &[u8]) -> Result<Request, String> {
    if said.len() > MAX_REQUEST {
        return Err(format!("the request is longer than {MAX_REQUEST} bytes"));
    }
    let line = said.split(|byte| *byte == b'\n').next().unwrap_or_default();
    if line.trim_ascii().is_empty() {
        return Ok(Request::default());
    }
    serde_json::from_slice(line).map_err(|error| {
        format!("cannot read the request ({error}): one line of JSON, as `vxmon tail` of the same version sends it")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_or_refused_with_the_reason() {
        assert_eq!(parse(b""), Ok(Request::default()));
        assert_eq!(parse(b"{}\r"), Ok(Request::default()));
        let asked = Request {
            format: Format::Text,
            lines: Some(3),
            wait: false,
            filter: Filter { dev: vec!["eth0".into()], inner: vec![":53".parse().unwrap()], ..Filter::default() },
        };
        assert_eq!(parse(&serde_json::to_vec(&asked).unwrap()), Ok(asked));
        for bad in [
            &b"GET / HTTP/1.1\r"[..],
            b"{\"inner\":[\"x\"]}",
            b"{\"color\":1}",
            b"{\"filter\":{\"color\":1}}",
            b"\xff\xfe",
            b"{",
        ] {
            assert!(parse(bad).is_err_and(|why| why.lines().count() == 1), "{}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn groups_by_name_and_number() {
        assert!(matches!(group_id("0"), Ok(0)));
        assert!(matches!(group_id("root"), Ok(0)));
        assert!(matches!(group_id("no such group"), Err(SocketError::NoGroup(_))));
    }
}
