"""Who may read: login, sessions, guesses, host names, other sites."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from turnout.dashboard import Dashboard, DashboardOptions
from turnout.dashboard.access import Access, read_token
from turnout.server.fleet.certs import create_authority, create_server
from turnout.wire import ConfigError

TOKEN = "a token of thirty-two characters"
GUARDED = (
    "/api/v1/runs", "/api/v1/info", "/api/v1/methods", "/api/v1/export/runs.csv", "/api/v1/stream",
    "/api/v1/nothing", "/openapi.json", "/api/v1/compare",
)  # fmt: skip
OPEN = ("/healthz", "/readyz", "/metrics", "/api/v1/session", "/", "/runs/x")


@pytest.fixture
def guarded(recorded: Path) -> Iterator[Dashboard]:
    with Dashboard(recorded, DashboardOptions(port=0, token=TOKEN), catalogue=list) as dashboard:
        yield dashboard


def test_without_a_login_there_is_nothing_to_see(guarded: Dashboard) -> None:
    with httpx.Client(base_url=guarded.url) as client:
        for path in GUARDED:
            answer = client.get(path)
            assert answer.status_code == 401, path
            assert answer.json()["error"]["code"] == "not-logged-in"
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in OPEN:
            assert client.get(path).status_code == 200, path
        assert client.get("/api/v1/session").json() == {"required": True, "authenticated": False}
        for cookie in ("turnout_session=", "turnout_session=x", f"turnout_session={TOKEN}"):
            assert client.get("/api/v1/runs", headers={"Cookie": cookie}).status_code == 401


def test_login_and_logout(guarded: Dashboard) -> None:
    with httpx.Client(base_url=guarded.url) as client:
        assert client.post("/api/v1/session", json={"token": "wrong"}).status_code == 401
        answer = client.post("/api/v1/session", json={"token": TOKEN})
        assert answer.status_code == 204
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert "path=/" in cookie
        assert "secure" not in cookie  # Plain HTTP; with TLS it is, see below.
        assert TOKEN not in cookie
        assert client.get("/api/v1/runs").status_code == 200
        assert client.get("/api/v1/session").json()["authenticated"]
        stolen = {"Cookie": f"turnout_session={client.cookies['turnout_session']}"}
        assert client.delete("/api/v1/session").status_code == 204
        assert client.get("/api/v1/runs").status_code == 401
        assert (
            httpx.get(f"{guarded.url}api/v1/runs", headers=stolen).status_code == 401
        )  # Ended at the server, too.


def test_scripts_bring_the_token(guarded: Dashboard) -> None:
    def asked(header: str | bytes) -> int:
        return httpx.get(f"{guarded.url}api/v1/runs", headers={"Authorization": header}).status_code

    assert asked(f"Bearer {TOKEN}") == 200
    assert asked(f"bearer {TOKEN}") == 200
    for wrong in (f"Basic {TOKEN}", "Bearer", TOKEN, "Bearer ünicode".encode()):
        assert asked(wrong) == 401


@pytest.mark.parametrize("how", ["login", "bearer"])
def test_guesses_are_limited(guarded: Dashboard, how: str) -> None:
    with httpx.Client(base_url=guarded.url) as client:

        def guess(token: str) -> httpx.Response:
            if how == "login":
                return client.post("/api/v1/session", json={"token": token})
            return client.get("/api/v1/runs", headers={"Authorization": f"Bearer {token}"})

        assert [guess(f"wrong {number}").status_code for number in range(5)] == [401] * 5
        limited = guess(TOKEN)  # Not even the right one: a guesser must learn nothing.
        assert limited.status_code == 429
        assert 1 <= int(limited.headers["retry-after"]) <= 61
        assert limited.json()["error"]["code"] == "too-many"


def test_an_open_session_goes_on_while_others_guess(guarded: Dashboard) -> None:
    with httpx.Client(base_url=guarded.url) as client:
        client.post("/api/v1/session", json={"token": TOKEN})
        for number in range(8):
            httpx.post(f"{guarded.url}api/v1/session", json={"token": str(number)})
        assert client.get("/api/v1/runs").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://[bad"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_other_sites_cannot_log_in_or_out(guarded: Dashboard, headers: dict[str, str]) -> None:
    with httpx.Client(base_url=guarded.url) as client:
        assert client.post("/api/v1/session", json={"token": TOKEN}, headers=headers).status_code == 403
        assert client.delete("/api/v1/session", headers=headers).status_code == 403
        same = {"Origin": guarded.url.rstrip("/"), "Sec-Fetch-Site": "same-origin"}
        assert client.post("/api/v1/session", json={"token": TOKEN}, headers=same).status_code == 204


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:PORT", 200), ("127.0.0.1:PORT", 200), ("127.0.0.1", 200), ("[::1]:PORT", 200),
        ("LOCALHOST", 200), ("evil.example", 403), ("evil.example:PORT", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:PORT", 403), ("", 403), ("[::1].evil.example", 403),
    ],
)  # fmt: skip
def test_names_that_others_pointed_here_are_refused(served: Dashboard, host: str, status: int) -> None:
    """DNS rebinding: a page of evil.example lets its own name mean 127.0.0.1 and reads along."""
    shown = host.replace("PORT", str(served.port))
    for path in ("/api/v1/runs", "/", "/healthz"):
        answer = httpx.get(f"{served.url.rstrip('/')}{path}", headers={"Host": shown})
        assert answer.status_code == status
        assert "access-control-allow-origin" not in answer.headers


def test_headers(served: Dashboard) -> None:
    for path in ("/", "/api/v1/runs", "/api/v1/nothing", "/assets/nothing.js"):
        headers = httpx.get(f"{served.url.rstrip('/')}{path}").headers
        policy = headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe-eval" not in policy
        assert "script-src" not in policy  # So it is 'self', without inline scripts.
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "server" not in headers
    assert httpx.get(f"{served.url}api/v1/runs").headers["cache-control"] == "no-store"
    assert httpx.get(f"{served.url}docs").status_code == 404


def test_beyond_loopback_a_token_is_needed(recorded: Path) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(ConfigError, match="--token-file FILE, or --generate-token"):
            Dashboard(recorded, DashboardOptions(host=host, port=0), catalogue=list)
    with Dashboard(recorded, DashboardOptions(host="0.0.0.0", port=0, token=TOKEN), catalogue=list) as served:
        url = f"http://127.0.0.1:{served.port}"
        assert httpx.get(f"{url}/api/v1/runs").status_code == 401
        headers = {"Authorization": f"Bearer {TOKEN}", "Host": "dashboard.example"}
        assert httpx.get(f"{url}/api/v1/runs", headers=headers).status_code == 200


def test_token_files(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o600)
    assert read_token(file) == TOKEN
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_token(file)
    file.chmod(0o600)
    for bad in ("short", "", "x" * 600, "two lines of text\nand another one", "\x00" * 32):
        file.write_text(bad)
        with pytest.raises(ConfigError, match="16 to 512 characters"):
            read_token(file)
    file.write_bytes(b"\xff" * 32)
    with pytest.raises(ConfigError, match="not text"):
        read_token(file)
    with pytest.raises(ConfigError, match="No such file"):
        read_token(tmp_path / "none")


def test_with_tls_the_cookie_is_secure(recorded: Path, tmp_path: Path) -> None:
    create_authority(tmp_path)
    create_server(tmp_path, ["localhost", "127.0.0.1"])
    options = DashboardOptions(
        port=0, token=TOKEN, certificate=tmp_path / "server.pem", key=tmp_path / "server.key"
    )
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    with (
        Dashboard(recorded, options, catalogue=list) as served,
        httpx.Client(base_url=served.url, verify=context) as client,
    ):
        assert served.url.startswith("https://")
        answer = client.post("/api/v1/session", json={"token": TOKEN})
        assert "secure" in answer.headers["set-cookie"].lower()
        assert client.get("/api/v1/runs").status_code == 200


def test_sessions_run_out_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from turnout.dashboard import access as module

    now = 1_000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    access = Access(TOKEN)
    first = access.open_session()
    assert access.has_session(first)
    now += module.SESSION_SECONDS + 1
    assert not access.has_session(first)
    sessions = [access.open_session() for _ in range(1_001)]
    assert not access.has_session(sessions[0])
    assert all(access.has_session(session) for session in sessions[1:])
    for number in range(20_000):
        access.note_failure(str(number))
    assert access.wait_seconds("19999") == 0
    for _ in range(5):
        access.note_failure("one")
    assert access.wait_seconds("one") > 59
    now += 61
    assert access.wait_seconds("one") == 0


@pytest.mark.parametrize("length", ["5000", "-1", "x", "99999999999999999999999999"])
def test_bodies_are_small(served: Dashboard, length: str) -> None:
    import socket

    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        head = f"POST /api/v1/session HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
        connection.sendall(head.encode())
        assert int(connection.recv(100).split()[1]) in (400, 413)
