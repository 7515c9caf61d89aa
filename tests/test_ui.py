"""The page: a visitor makes a picture, stops one, and reads what was wrong; a stop is per visitor."""

import hashlib
import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from chromium import headless_chromium

from diffopt.errors import InputError

ROOT = Path(__file__).parent.parent


def test_a_stop_ends_that_visitors_job_only():
    from diffopt.ui.jobs import Jobs

    jobs = Jobs()
    assert not jobs.stop("ann")
    with jobs.running("ann") as ann, jobs.running("bob") as bob:
        assert jobs.stop("ann")
        assert ann.is_set()
        assert not bob.is_set()
    assert not jobs.stop("bob")


@pytest.mark.parametrize("port", ["seven", "0x1", "70000", "-1", ""])
def test_a_port_that_is_none_is_refused_in_words(port):
    from diffopt.ui.page import _free_port

    with pytest.raises(InputError, match=r"port: .* a free port from 1 to 65535 is needed"):
        _free_port(port)


def test_a_port_in_use_is_refused_in_words():
    from diffopt.ui.page import _free_port

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        taken = listening.getsockname()[1]
        with pytest.raises(InputError, match=f"'{taken}' is not possible; a free port"):
            _free_port(str(taken))
    assert _free_port(str(taken)) == taken


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium that makes no calls of its own."""
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
    with headless_chromium("--disable-quic", *quiet) as browser:
        yield browser


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The page as a user starts it, in a folder of its own: (address, output folder)."""
    folder = tmp_path_factory.mktemp("page")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (folder / "log").open("w")
    command = [sys.executable, str(ROOT / "app.py"), "--port", str(port), "--output", str(folder / "out")]
    process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(180):
            assert process.poll() is None, (folder / "log").read_text()
            try:
                urllib.request.urlopen(f"{address}/healthz", timeout=1).read()
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail("the page did not come up: " + (folder / "log").read_text())
        yield address, folder / "out"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
def page(chromium, server):
    tab = chromium.new_page(viewport={"width": 1280, "height": 860})
    tab.goto(server[0])
    tab.wait_for_selector("#start")
    yield tab
    tab.close()


def status(page) -> str:
    return page.inner_text("#status")


def wait_for(page, pattern: str, seconds: float = 120.0) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        text = status(page)
        if re.search(pattern, text):
            return text
        page.wait_for_timeout(100)
    raise AssertionError(f"the status never matched {pattern!r}; it is {status(page)!r}")


@pytest.mark.browser
@pytest.mark.slow
def test_a_visitor_makes_a_picture(page, server):
    page.get_by_label("Prompt", exact=True).fill("a red apple, noto style")
    page.get_by_label("Seed").fill("7")
    page.click("#start")
    text = wait_for(page, r"it/s · seed 7")
    assert re.search(r"\d+\.\d\d s · \d+\.\d\d it/s · seed 7 · (sdpa|diffopt) in 20 layers", text)

    written = sorted(server[1].glob("*.png"))
    assert len(written) == 1
    shown = page.locator("#picture img").get_attribute("src")
    served = urllib.request.urlopen(shown).read()
    assert hashlib.sha256(served).digest() == hashlib.sha256(written[0].read_bytes()).digest()
    info = subprocess.run(
        [sys.executable, "-m", "diffopt.cli", "info", str(written[0]), "--json"], capture_output=True, text=True
    )
    assert json.loads(info.stdout)["prompt"] == "a red apple, noto style"

    page.get_by_text("What ran in each attention layer").click()
    page.wait_for_timeout(500)
    assert "attn1" in page.inner_text("#report")


@pytest.mark.browser
@pytest.mark.slow
def test_a_stop_stops_at_the_next_step(page, server):
    before = set(server[1].glob("*.png"))
    page.get_by_label("Prompt", exact=True).fill("blue heart")
    page.get_by_label("number input for Steps").fill("100")
    page.click("#start")
    wait_for(page, r"Step \d+ of 100")
    page.click("#stop")
    wait_for(page, "Stopped", seconds=20)
    assert set(server[1].glob("*.png")) == before


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize(
    ("label", "value", "words"),
    [
        ("Seed", "7.5", "seed: '7.5' is not possible; a whole number from 0"),
        ("Prompt", "", "prompt: '' is not possible; some text is needed"),
        ("Size", "130x128", "width: 130 is not possible; a multiple of 8 is needed, such as 128"),
        ("Size", "4096x4096", "not possible"),
        ("Size", "large", "size: 'large' is not possible; width and height are needed"),
    ],
)
def test_what_is_wrong_is_said_in_words(page, label, value, words):
    page.get_by_label("Prompt", exact=True).fill("blue heart")
    field = page.get_by_label(label, exact=True)
    field.fill(value)
    field.press("Tab")
    page.click("#start")
    text = wait_for(page, "not possible", seconds=20)
    assert words in text
    assert "Traceback" not in text


@pytest.mark.browser
@pytest.mark.slow
def test_other_hosts_names_are_refused(server):
    request = urllib.request.Request(f"{server[0]}/healthz", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 400
