//! The HTTP server of `--metrics`: /metrics, /healthz, /readyz. GET and HEAD only, no request body is read, and everything
//! is bounded: connections, the size of a request's head, and how long a connection may take. It only reads the [`Board`].

use std::{convert::Infallible, io, net::TcpListener, sync::Arc, time::Duration};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{ACCEPT, ALLOW, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::Semaphore;

use super::metrics::{Board, Exposition};

/// Connections at a time; further ones wait.
const MAX_CONNECTIONS: usize = 32;
/// The longest head of a request, bytes. The least that hyper takes.
const MAX_HEAD: usize = 8192;
/// How long a client may take to send the head of a request, the wait for it included.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection lasts at most.
const CONNECTION: Duration = Duration::from_secs(60);
const PLAIN: &str = "text/plain; charset=utf-8";

/// Serves until `done`.
pub async fn serve(listener: TcpListener, board: Arc<Board>, done: impl Future<Output = ()>) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = tokio::task::JoinSet::new();
    tokio::pin!(done);
    loop {
        let accepted = async {
            let permit = Arc::clone(&room).acquire_owned().await.map_err(io::Error::other)?;
            Ok::<_, io::Error>((listener.accept().await?.0, permit))
        };
        let (stream, permit) = tokio::select! {
            () = &mut done => return Ok(()),
            Some(_) = connections.join_next() => continue,
            accepted = accepted => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    log::debug!("cannot accept a connection for metrics: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        let board = Arc::clone(&board);
        connections.spawn(async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let response = respond(&request, &board);
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .max_buf_size(MAX_HEAD)
                .serve_connection(TokioIo::new(stream), service);
            match tokio::time::timeout(CONNECTION, connection).await {
                Ok(Ok(())) | Err(_) => {}
                Ok(Err(error)) => log::debug!("a client of the metrics: {error}"),
            }
            drop(permit);
        });
    }
}

fn respond(request: &Request<Incoming>, board: &Board) -> Response<Full<Bytes>> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut response = page(StatusCode::METHOD_NOT_ALLOWED, PLAIN, "GET and HEAD only\n".to_owned());
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match request.uri().path() {
        "/metrics" => {
            let accepts = request.headers().get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
            let exposition = Exposition::accepted(accepts);
            page(StatusCode::OK, exposition.content_type(), board.expose(exposition))
        }
        "/healthz" => state(board.healthy()),
        "/readyz" => state(board.ready()),
        "/" => page(StatusCode::OK, PLAIN, "vxmon: /metrics /healthz /readyz\n".to_owned()),
        _ => page(StatusCode::NOT_FOUND, PLAIN, "there is /metrics, /healthz and /readyz\n".to_owned()),
    }
}

fn state(result: Result<(), String>) -> Response<Full<Bytes>> {
    match result {
        Ok(()) => page(StatusCode::OK, PLAIN, "ok\n".to_owned()),
        Err(why) => page(StatusCode::SERVICE_UNAVAILABLE, PLAIN, why + "\n"),
    }
}

fn page(status: StatusCode, content_type: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
