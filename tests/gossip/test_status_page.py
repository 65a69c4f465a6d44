"""The status page says what the report says, runs nothing that peers write, and answers only those it should."""

from __future__ import annotations

import asyncio
import copy
import http.client
import json
import re
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Self

import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from crdtmerge.gossip import status
from crdtmerge.gossip.status import Disagreement, Merged, Peer, Report, Transfer, Visible, application
from tests.gossip.browser import browser, complaints, preferring, requested, resized

WAIT_SECONDS = 60
HOSTILE = (
    "<img src=x onerror=\"window.ran='note'\"><script>window.ran='script'</script>",
    "</script><script>window.ran='closed'</script>",
    "invoice\u202egnp.exe\u2066\x00\x1b[31m\u200b",
)


def digest(number: int) -> str:
    return f"{number:064x}"[::-1]


def contribution(number: int, **said: Any) -> Visible:
    plain = Visible(
        id=digest(number),
        weight="1",
        role="task",
        task=None,
        adders=[digest(1)],
        note=None,
        ready=True,
        bytes=3_000_000_000,
        missing_bytes=0,
    )
    return plain | said  # type: ignore[return-value]


def peer(number: int, **said: Any) -> Peer:
    plain = Peer(
        url=f"https://peer-{number}.example:8700",
        key=digest(900 + number),
        state="connected",
        last_sync_seconds_ago=2.0,
        rtt_seconds=0.012,
        failures=0,
        next_try_seconds=None,
        ops_sent=5,
        ops_received=7,
        bytes_sent=1500,
        bytes_received=2_500_000,
        reason=None,
    )
    return plain | said  # type: ignore[return-value]


def agreed() -> Report:
    """Two peers, two contributions, one merge, and no trouble."""
    return Report(
        pool=digest(100),
        actor=digest(1),
        address="https://here.example:8700",
        version="0.1.0",
        uptime_seconds=4000.0,
        root=digest(101),
        state_root=digest(102),
        recipe="ties density=0.2",
        ops=1234,
        visible_count=2,
        ready_count=2,
        visible=[contribution(11, note="fine-tuned on GSM8K"), contribution(12, weight="0.5", task="code")],
        hidden_count=3,
        peers=[peer(1), peer(2)],
        transfers=[],
        merged=Merged(state="current", out="/srv/model", merge_id=digest(103), output_digest=digest(104), message=None),
        disagreements=[],
        forks=[],
        warnings=[],
        totals={
            "ops_sent": 10,
            "ops_received": 14,
            "bytes_sent": 3000,
            "bytes_received": 5_000_000,
            "blobs_fetched": 9,
        },
    )


def disputed() -> Report:
    report = agreed()
    report["disagreements"] = [
        Disagreement(merge_id=digest(103), ours=digest(104), theirs=digest(105), key=digest(901))
    ]
    return report


def impossible() -> Report:
    raise OSError("the disk is gone")


class Serving:
    """A status application on loopback, in a thread with a loop of its own. What it reports can be changed."""

    def __init__(self, report: Report) -> None:
        self.report: Report | Callable[[], Report] = report
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._runner: web.AppRunner | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        self._do(self._start())

    def stop(self) -> None:
        if self._runner is not None:
            self._do(self._runner.cleanup())
            self._runner = None

    async def _start(self) -> None:
        self._runner = web.AppRunner(application(self._made, hosts=["Status.example"]))
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT_SECONDS)

    def _made(self) -> Report:
        return self.report() if callable(self.report) else copy.deepcopy(self.report)


@pytest.fixture
def serving() -> Iterator[Serving]:
    with Serving(agreed()) as server:
        yield server


# Without a browser


@contextmanager
def asked(
    server: Serving, path: str, method: str = "GET", host: str = "localhost"
) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT_SECONDS)
    try:
        connection.request(method, path, headers={"Host": host})
        yield connection.getresponse()
    finally:
        connection.close()


def code(server: Serving, path: str, method: str = "GET", host: str = "localhost") -> int:
    with asked(server, path, method, host) as response:
        return response.status


def heard(response: http.client.HTTPResponse) -> str:
    """The next message of a stream."""
    lines = []
    while line := response.readline().decode().rstrip("\n"):
        lines.append(line)
    return "\n".join(lines)


def test_the_report_is_served_as_json(serving: Serving) -> None:
    with asked(serving, "/api/status") as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("application/json")
        assert json.load(response) == agreed()


def test_metrics_carry_the_numbers_of_the_report(serving: Serving) -> None:
    report = agreed()
    report["visible"][1] |= {"ready": False, "missing_bytes": 5}
    report["ready_count"] = 1
    report["peers"] += [
        peer(3, state="failing", rtt_seconds=None),
        peer(4, url=None, state="banned", rtt_seconds=0.5),
        peer(1),
    ]
    report["disagreements"] = disputed()["disagreements"]
    serving.report = report
    with asked(serving, "/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        text = response.read().decode()
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples == {
        ("crdtmerge_build_info", "0.1.0"): 1,
        ("crdtmerge_uptime_seconds",): 4000,
        ("crdtmerge_ops",): 1234,
        ("crdtmerge_visible_contributions",): 2,
        ("crdtmerge_ready_contributions",): 1,
        ("crdtmerge_hidden_contributions",): 3,
        ("crdtmerge_peers", "connected"): 3,
        ("crdtmerge_peers", "waiting"): 0,
        ("crdtmerge_peers", "failing"): 1,
        ("crdtmerge_peers", "banned"): 1,
        ("crdtmerge_peer_rtt_seconds", "https://peer-1.example:8700"): 0.012,
        ("crdtmerge_peer_rtt_seconds", "https://peer-2.example:8700"): 0.012,
        ("crdtmerge_peer_rtt_seconds", digest(904)): 0.5,
        ("crdtmerge_transfers_in_progress",): 0,
        ("crdtmerge_disagreements",): 1,
        ("crdtmerge_forks",): 0,
        ("crdtmerge_merge_state", "current"): 1,
        ("crdtmerge_merge_state", "merging"): 0,
        ("crdtmerge_merge_state", "waiting"): 0,
        ("crdtmerge_merge_state", "failed"): 0,
        ("crdtmerge_ops_received_total",): 14,
        ("crdtmerge_ops_sent_total",): 10,
        ("crdtmerge_bytes_received_total",): 5_000_000,
        ("crdtmerge_bytes_sent_total",): 3000,
        ("crdtmerge_blobs_fetched_total",): 9,
    }


def test_health_is_whether_a_report_can_be_made(serving: Serving) -> None:
    with asked(serving, "/healthz") as response:
        assert (response.status, json.load(response)) == (200, {"status": "ok"})
    serving.report = impossible
    assert [code(serving, path) for path in ("/healthz", "/api/status", "/metrics", "/events", "/")] == [503] * 4 + [
        200
    ]
    with asked(serving, "/healthz") as response:
        assert json.load(response) == {"status": "failing", "reason": "the report cannot be made: the disk is gone"}


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1:8900", "[::1]", "[::1]:8900", "status.example"]
)
def test_a_host_of_ours_is_answered(serving: Serving, host: str) -> None:
    assert code(serving, "/healthz", host=host) == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example:80",
        "localhost:80:80",
        "[::2]",
        "::1",
        "",
        "a@localhost",
    ],
)
@pytest.mark.parametrize("path", ["/", "/events", "/api/status", "/metrics", "/nothing"])
def test_another_host_is_refused(serving: Serving, host: str, path: str) -> None:
    assert code(serving, path, host=host) == 421


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_changed(serving: Serving, method: str) -> None:
    paths = ("/", "/events", "/api/status", "/metrics", "/healthz")
    assert {code(serving, path, method) for path in paths} == {405}
    assert {code(serving, path, "HEAD") for path in paths} == {200}


@pytest.mark.parametrize("path", ["/", "/events", "/api/status", "/metrics", "/healthz", "/nothing"])
def test_every_answer_has_the_headers_of_a_page_that_is_nobody_elses(serving: Serving, path: str) -> None:
    with asked(serving, path) as response:
        headers = response.headers
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy["script-src"])
    assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy["style-src"])
    assert (policy["connect-src"], policy["frame-ancestors"]) == ("'self'", "'none'")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store"
    assert "Access-Control-Allow-Origin" not in headers


def test_a_stream_tells_of_changes_and_not_of_time_that_passes(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "HEARTBEAT_SECONDS", 0.1)
    began, met = time.monotonic(), 2.0

    def ageing() -> Report:
        report, passed = agreed(), time.monotonic() - began
        report["uptime_seconds"] += passed
        report["peers"][0] |= {"last_sync_seconds_ago": met + passed, "next_try_seconds": 1000 - passed}
        report["peers"][1] |= {"last_sync_seconds_ago": None}
        return report

    serving.report = ageing
    with asked(serving, "/events") as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert json.loads(heard(response).removeprefix("data: "))["ops"] == 1234
        assert [heard(response)[0] for _ in range(5)] == [":"] * 5
        met = 60.0
        while (message := heard(response)).startswith(":"):
            pass
        assert json.loads(message.removeprefix("data: "))["peers"][0]["last_sync_seconds_ago"] >= 60


def test_no_more_streams_are_open_than_the_limit(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "CLIENTS_MAX", 3)
    streams = [asked(serving, "/events") for _ in range(3)]
    for stream in streams:
        heard(stream.__enter__())
    with asked(serving, "/events") as response:
        assert response.status == 503
        assert json.load(response)["reason"] == "3 pages are open already; close one"
    assert code(serving, "/api/status") == 200
    streams.pop().__exit__(None, None, None)
    eventually(lambda: code(serving, "/events", "HEAD") == 200)
    for stream in streams:
        stream.__exit__(None, None, None)


def test_streams_end_when_the_peer_does_or_can_report_no_more(serving: Serving) -> None:
    with asked(serving, "/events") as response:
        heard(response)
        serving.report = impossible
        assert response.read() == b""
    serving.report = agreed()
    with asked(serving, "/events") as response:
        heard(response)
        serving.stop()
        assert response.read() == b""


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not holds():
        assert time.monotonic() < deadline, "it has not come to hold"
        time.sleep(0.1)


# In a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with browser(tmp_path_factory.mktemp("chromium")) as chrome:
        yield chrome


@pytest.fixture
def chrome(chromium: Chrome) -> Chrome:
    chromium.get("about:blank")
    resized(chromium, 1280, 900)
    preferring(chromium, "light")
    complaints(chromium)
    requested(chromium)
    return chromium


def opened(chrome: Chrome, server: Serving) -> None:
    """Show the page, and wait until it has drawn a report."""
    chrome.get(server.url)
    until(chrome, lambda: text(chrome, "#link") == "Live" and text(chrome, "#ops") != "")


def until(chrome: Chrome, holds: Callable[[], bool]) -> None:
    WebDriverWait(chrome, WAIT_SECONDS, 0.1).until(lambda _: holds())


def text(chrome: Chrome, selector: str) -> str:
    """What is read in an element."""
    return chrome.find_element(By.CSS_SELECTOR, selector).text


def texts(chrome: Chrome, selector: str) -> list[str]:
    return [element.text for element in chrome.find_elements(By.CSS_SELECTOR, selector)]


def test_the_page_shows_what_the_report_says(chrome: Chrome, serving: Serving) -> None:
    report = agreed()
    report["visible"] += [
        contribution(13, ready=False, missing_bytes=1_000_000_000, adders=[digest(901)]),
        contribution(14, ready=False, bytes=None),
    ]
    report["visible_count"], report["ready_count"] = 4, 2
    report["peers"].append(peer(3, state="failing", failures=4, next_try_seconds=900.0, reason="connection refused"))
    report["transfers"] = [Transfer(digest=digest(50), content=digest(13), bytes=4000, done_bytes=1000, sources=2)]
    report["warnings"] = ["the disk is nearly full"]
    serving.report = report
    opened(chrome, serving)
    for name, value in (("merged", digest(104)), ("root", digest(101)), ("pool", digest(100))):
        assert chrome.execute_script(f"return document.getElementById('{name}').textContent") == value
    assert text(chrome, "#ops") == "1,234"
    assert text(chrome, "#recipe") == "ties density=0.2"
    assert text(chrome, "#verdict") == "Fetching"
    assert "2 of 3 peers connected" in text(chrome, "#why")
    assert text(chrome, "#warnings") == "the disk is nearly full"
    first, second, third, fourth = texts(chrome, "#visible tbody tr")
    assert all(words in first for words in (digest(11)[:12], "fine-tuned on GSM8K", "this peer", "ready 3.0 GB"))
    assert "0.5" in second
    assert "code" in second
    assert "missing 1.0 GB of 3.0 GB" in third
    assert digest(901)[:12] in third
    assert "announced" in fourth
    failing = texts(chrome, "#peers tbody tr")[2]
    assert all(words in failing for words in ("peer-3.example", "failing", "4 failures, next try in 14 min", "refused"))
    assert "25 % · 1.0 kB of 4.0 kB · from 2 peers" in text(chrome, "#flights tbody tr")
    assert chrome.find_element(By.CSS_SELECTOR, "#received").get_attribute("title") == "5,000,000 bytes"
    assert complaints(chrome) == []


def test_nothing_is_requested_from_elsewhere(chrome: Chrome, serving: Serving) -> None:
    opened(chrome, serving)
    sent = [url for url in requested(chrome) if not url.startswith(("data:", "about:"))]
    assert {serving.url, f"{serving.url}events"} <= {*sent}
    assert [url for url in sent if not url.startswith(serving.url)] == []
    assert complaints(chrome) == []


def test_a_change_is_seen_without_a_reload(chrome: Chrome, serving: Serving) -> None:
    opened(chrome, serving)
    assert text(chrome, "#verdict") == "In agreement"
    chrome.execute_script(
        "window.same = true; getSelection().selectAllChildren(document.querySelector('#visible tbody td'))"
    )
    selected = chrome.execute_script("return String(getSelection())")
    report = agreed()
    report["ops"] = 1240
    report["visible"].insert(0, contribution(10))
    serving.report = report
    until(chrome, lambda: text(chrome, "#ops") == "1,240")
    assert [row[:12] for row in texts(chrome, "#visible tbody tr")] == [digest(number)[:12] for number in (10, 11, 12)]
    assert chrome.execute_script("return [window.same, String(getSelection())]") == [True, selected]


def test_what_peers_write_is_shown_and_never_run(chrome: Chrome, serving: Serving) -> None:
    report = agreed()
    hostile = [
        contribution(20 + number, note=note, task=note, role=note, weight=note) for number, note in enumerate(HOSTILE)
    ]
    report["visible"], report["visible_count"], report["ready_count"] = hostile, len(hostile), len(hostile)
    report["peers"] = [
        peer(1, state="banned", reason=HOSTILE[0], url=HOSTILE[1]),
        peer(2, state="failing", reason=HOSTILE[2]),
    ]
    report["warnings"], report["recipe"], report["address"] = list(HOSTILE), HOSTILE[0], HOSTILE[1]
    report["merged"] = Merged(state="failed", out=HOSTILE[0], merge_id=None, output_digest=None, message=HOSTILE[2])
    serving.report = report
    opened(chrome, serving)
    notes = texts(chrome, "#visible tbody tr [data-f=note]")
    assert notes[:2] == list(HOSTILE[:2])
    assert notes[2] == r"invoice\u{202e}gnp.exe\u{2066}\u{0}\u{1b}[31m\u{200b}"
    assert HOSTILE[0] in text(chrome, "#alarm")
    page = chrome.execute_script(
        "return document.body.innerText + [...document.querySelectorAll('[title]')].map(e => e.title)"
    )
    assert not {*page} & {*"\u202e\u2066\x00\x1b\u200b"}
    assert chrome.execute_script("return [window.ran, document.querySelectorAll('img, body script').length]") == [
        None,
        1,
    ]
    assert complaints(chrome) == []


def test_a_disagreement_is_an_alert(chrome: Chrome, serving: Serving) -> None:
    opened(chrome, serving)
    assert texts(chrome, "[role=alert]") == [""]
    report = disputed()
    report["forks"] = [{"key": digest(77), "ops": [digest(78), digest(79)]}]
    report["peers"][1]["state"] = "banned"
    serving.report = report
    until(chrome, lambda: text(chrome, "#verdict") == "Not in agreement")
    alert = text(chrome, "[role=alert]")
    assert f"Peer {digest(901)[:12]} at https://peer-1.example:8700 says the same merge has another digest" in alert
    assert all(digest(number) in alert for number in (103, 104, 105, 77, 78, 79))
    assert f"Peer {digest(902)[:12]} at https://peer-2.example:8700 is banned" in alert
    assert chrome.title.startswith("⚠ Not in agreement")
    serving.report = agreed()
    until(chrome, lambda: texts(chrome, "[role=alert]") == [""])


COLOURS = """
const shown = node => {
  for (let at = node; at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if (!colour.endsWith(", 0)")) return colour;
  }
};
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), seen = new Map();
while (walk.nextNode()) {
  const node = walk.currentNode.parentElement, style = getComputedStyle(node);
  if (!walk.currentNode.data.trim() || !node.checkVisibility() || node.closest("script, .unseen")) continue;
  const colours = [style.color, shown(node), style.opacity];
  seen.set(colours.join(), [node.id || node.className || node.tagName, ...colours]);
}
return [...seen.values()];
"""


def luminance(colour: list[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (one / 255 for one in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(front: str, back: str, opacity: str) -> float:
    """The contrast ratio of WCAG 2 between two colours as the browser tells them."""
    ink, paper = ([float(part) for part in re.findall(r"[\d.]+", colour)[:3]] for colour in (front, back))
    ink = [float(opacity) * a + (1 - float(opacity)) * b for a, b in zip(ink, paper, strict=True)]
    darker, lighter = sorted((luminance(ink), luminance(paper)))
    return (lighter + 0.05) / (darker + 0.05)


def test_every_text_can_be_read_in_light_and_in_dark(chrome: Chrome, serving: Serving) -> None:
    report = disputed()
    report["visible"].append(contribution(13, ready=False, missing_bytes=7, note=HOSTILE[2]))
    report["peers"] += [peer(3, state="failing"), peer(4, state="waiting"), peer(5, state="banned", reason=HOSTILE[2])]
    report["warnings"] = ["the disk is nearly full"]
    serving.report = report
    opened(chrome, serving)
    ground = {}
    for scheme in ("light", "dark"):
        preferring(chrome, scheme)
        colours = chrome.execute_script(COLOURS)
        assert len(colours) > 8
        faint = [found for found in colours if contrast(*found[1:]) < 4.5]
        assert not faint, f"{scheme}: {faint}"
        ground[scheme] = chrome.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ground["light"] != ground["dark"]


@pytest.mark.parametrize("width", [360, 390, 800])
def test_no_width_needs_scrolling_sideways(chrome: Chrome, serving: Serving, width: int) -> None:
    report = disputed()
    report["visible"].append(contribution(13, weight="0." + "3" * 40, role="r" * 60, task="t" * 100, note="n" * 1000))
    report["peers"].append(peer(3, url="https://" + "long" * 40 + ".example", state="failing", reason="because" * 50))
    report["transfers"] = [Transfer(digest=digest(50), content=None, bytes=4 * 10**12, done_bytes=10**12, sources=3)]
    report["recipe"], report["warnings"] = "ties " + "x" * 300, ["w" * 300]
    report["merged"] = Merged(
        state="waiting", out="/srv/" + "m" * 300, merge_id=None, output_digest=digest(1), message=None
    )
    serving.report = report
    resized(chrome, width, 844)
    opened(chrome, serving)
    wide, inner = chrome.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert wide <= inner <= width


def test_five_hundred_contributions_are_drawn(chrome: Chrome, serving: Serving) -> None:
    report = agreed()
    report["visible"], report["visible_count"] = [contribution(number) for number in range(1000, 1500)], 1700
    report["ready_count"] = 1700
    report["peers"] = [peer(number) for number in range(20)]
    serving.report = report
    opened(chrome, serving)
    assert chrome.execute_script("return document.querySelectorAll('#visible tbody tr').length") == 500
    assert text(chrome, "#listed-count") == "the first 500 of 1,700"
    assert text(chrome, "#peers-count") == "20"


def test_an_empty_set_says_so(chrome: Chrome, serving: Serving) -> None:
    report = agreed()
    report |= {"visible": [], "visible_count": 0, "ready_count": 0, "peers": [], "merged": None}
    serving.report = report
    opened(chrome, serving)
    assert text(chrome, "#verdict") == "No peers yet"
    assert "Nothing is visible yet" in text(chrome, "#visible")
    assert text(chrome, "#merged") == "none yet"


def test_a_lost_connection_is_said_and_taken_up_again(chrome: Chrome, serving: Serving) -> None:
    opened(chrome, serving)
    chrome.execute_script("window.same = true")
    serving.stop()
    until(chrome, lambda: text(chrome, "#link") == "Connection lost")
    assert "The connection to this peer is lost. What is shown is from" in text(chrome, "#lost[role=status]")
    report = agreed()
    report["ops"] = 5678
    serving.report = report
    serving.start()
    until(chrome, lambda: text(chrome, "#link") == "Live" and text(chrome, "#ops") == "5,678")
    assert text(chrome, "#lost") == ""
    assert chrome.title.startswith("In agreement")
    assert chrome.execute_script("return window.same") is True


def test_a_page_that_is_one_too_many_says_why(
    chrome: Chrome, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "CLIENTS_MAX", 0)
    chrome.get(serving.url)
    until(chrome, lambda: "0 pages are open already" in text(chrome, "#lost"))
    monkeypatch.setattr(status, "CLIENTS_MAX", 1)
    until(chrome, lambda: text(chrome, "#link") == "Live")


def test_a_digest_is_copied_whole(chrome: Chrome, serving: Serving) -> None:
    opened(chrome, serving)
    button = chrome.find_element(By.CSS_SELECTOR, "[data-copies=merged]")
    assert chrome.execute_script("return arguments[0].textContent", button) == "Copy the merged digest"
    chrome.execute_script("navigator.clipboard.writeText = async words => { window.copied = words; }")
    button.send_keys("\n")
    until(chrome, lambda: chrome.execute_script("return window.copied") == digest(104))
