"""``vlmprune show`` as a visitor meets it: the command in a process of its own, and headless Chromium in front of it.

``python tests/pages/test_web.py FOLDER`` writes the screenshots of docs/show.md.
"""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="Gradio is not installed (make test-pages)")

from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).parents[2]
GLYPHWORLD = ROOT / "examples" / "glyphworld"
CHECKPOINTS = [str(GLYPHWORLD / "checkpoint"), str(GLYPHWORLD / "checkpoint-576")]
SCENE = GLYPHWORLD / "images" / "scene_70001.png"
QUESTION = "locate the green phone ."
VLMPRUNE = [sys.executable, "-P", "-m", "vlmprune.cli"]
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update"]
PATIENCE = 60_000
"""Milliseconds that anything may take on a busy machine."""


def environment(**changes):
    """Of a user: kernels are not interpreted, packages are compiled once, and nothing is fetched."""
    theirs = ("TRITON_INTERPRET", "PYTHONDONTWRITEBYTECODE")
    ours = {k: v for k, v in os.environ.items() if k not in theirs and not k.startswith("GRADIO")}
    return ours | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"} | changes


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def shown(folder, *options, here=None):
    """Yield the page's address and the file that its errors go to; then end it, after which no upload may be left."""
    uploads, errors, port = folder / "uploads", folder / "stderr", str(free_port())
    command = [*VLMPRUNE, "show", "--port", port, "--device", "cpu", "--dtype", "float32", *options]
    env = environment(GRADIO_TEMP_DIR=str(uploads))
    with errors.open("w") as stderr:
        server = subprocess.Popen(
            command, cwd=here or folder, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    try:
        line = server.stdout.readline()
        assert line == f"http://127.0.0.1:{port}/ (Ctrl-C ends it)\n", line + errors.read_text()
        yield line.split()[0], errors
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) == 0
        assert not [path for path in uploads.rglob("*") if path.is_file()]
    finally:
        server.kill()
        server.wait()


@contextmanager
def chromium():
    path = shutil.which("chromium")
    if path is None:
        pytest.fail("needs Chromium on the PATH (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("show")
    shutil.copy(SCENE, folder / "it's.png")
    models = [word for path in CHECKPOINTS for word in ("--model", path)]
    with shown(folder, *models) as (address, errors):
        yield address, folder, errors


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@contextmanager
def visitor(browser, address, **context):
    """A page of a visitor's own; it asks nobody but us, and no script fails."""
    settings = {
        "viewport": {"width": 1440, "height": 900},
        "permissions": ["clipboard-read", "clipboard-write"],
    }
    context = browser.new_context(**settings | context)
    context.set_default_timeout(PATIENCE)
    page, asked, faults = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda fault: faults.append(str(fault)))
    page.goto(address)
    page.wait_for_selector("#methods input")
    yield page
    strangers = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    context.close()
    assert not strangers and not faults, (strangers, faults)


@pytest.fixture
def page(browser, server):
    with visitor(browser, server[0]) as page:
        yield page


@pytest.fixture(scope="module")
def idle(browser, server):
    """A page on which nothing was asked, for what does not ask either."""
    with visitor(browser, server[0]) as page:
        yield page


@pytest.fixture(scope="module")
def asked(browser, server):
    """A page on which one example was clicked, and what its status said meanwhile."""
    with visitor(browser, server[0]) as page:
        page.evaluate(
            """() => { window.told = []; const status = document.querySelector('#status');
            new MutationObserver(() => told.push(status.innerText.trim()))
            .observe(status, {subtree: true, childList: true, characterData: true}); }"""
        )
        ask(page, lambda: page.locator("[data-example]").first.click())
        yield page, page.evaluate("told")


def upload(page, path):
    """Put in a picture of one's own, in the place of any other."""
    if page.locator("#picture img").count():
        page.get_by_role("button", name="Clear").click()
    page.locator("#picture input[type=file]").set_input_files(path)


def tick(page, *names):
    """These methods and no others."""
    for name in every(page):
        page.locator(f"#methods input[value={name}]").set_checked(name in names)


def every(page):
    """Names of all methods."""
    return page.locator("#methods input").evaluate_all("(boxes) => boxes.map((box) => box.value)")


def ask(page, click):
    """Do what asks, and wait for all of the answers."""
    page.evaluate("document.querySelectorAll('.vp-results').forEach((old) => { old.dataset.old = 1; })")
    click()
    page.wait_for_selector(".vp-results:not([data-old]) .vp-copies")


def ask_own(page, path=SCENE, prompt=QUESTION):
    upload(page, path)
    page.wait_for_selector("#picture img")
    page.get_by_label("Question", exact=True).fill(prompt)
    ask(page, lambda: page.get_by_role("button", name="Ask", exact=True).click())


def card(page, name):
    return page.locator(".vp-card", has=page.get_by_role("heading", name=name, exact=True))


def answer(page, name):
    return card(page, name).locator(".vp-answer").inner_text()


def tokens(page, name):
    return float(card(page, name).locator("dl b").first.inner_text())


def pixels(page, name):
    """The card's picture as it is on the screen."""
    shot = card(page, name).locator(".vp-seen").screenshot()
    return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB"), int)


def differ(one, other):
    """Share of pixels that are clearly not the same; a card may begin between two pixels of the screen."""
    height, width = np.minimum(one.shape, other.shape)[:2]
    assert min(height, width) > 150
    return (np.abs(one[:height, :width] - other[:height, :width]).max(2) > 24).mean()


SAME = 0.02
"""Of its pixels: no two patches' worth."""


def test_the_first_screen(idle):
    assert idle.title() == "vlmprune show"
    assert idle.locator("[data-example]").count() == 6
    for button in idle.locator("[data-example]").all():
        box = button.bounding_box()
        assert box["y"] + box["height"] < 900
    assert idle.locator("#methods input").count() == 42
    assert idle.locator("#methods input:checked").count() == 4
    assert idle.get_by_label("feather RoPE-free attention").is_checked()
    assert idle.get_by_label("number input for Budget").input_value() == "78"


def test_everything_has_a_name(asked):
    """Every control has a label, a name or a text that a screen reader says."""
    nameless = asked[0].evaluate(
        """() => [...document.querySelectorAll('input, textarea, select, button, [role=img], progress')]
        .filter((e) => e.offsetParent && !(e.labels?.length || e.ariaLabel || e.title || e.innerText?.trim()
                 || document.getElementById(e.getAttribute('aria-labelledby'))))
        .map((e) => e.outerHTML.slice(0, 200))"""
    )
    assert not nameless


def test_an_example_is_asked_with_one_click(asked):
    page, told = asked
    assert any(re.fullmatch(r"Asking \w+ \([2-5] of 5\)", text) for text in told), told
    assert page.get_by_label("Question", exact=True).input_value() == QUESTION
    names = page.locator(".vp-card h3").all_inner_texts()
    assert {name: answer(page, name) for name in names} == {
        "unpruned": "9 11 12 14",
        "fastv": "9 11 12 14",
        "feather": "9 11 12 14",
        "visionzip": "0 17 4 21",
        "divprune": "9 11 12 14",
    }
    assert page.locator("mark").all_inner_texts() == ["0 17 4 21"]
    assert tokens(page, "unpruned") == 196
    for name in names[1:]:
        assert tokens(page, name) == pytest.approx(78, abs=1)
        assert re.search(r"FLOPs\s+0\.8\d G −\d\d%\s+prefill\s+[\d.]+ m?s", card(page, name).inner_text())


def test_the_slider_goes_through_the_stages(asked):
    page, _ = asked
    whole, slider = pixels(page, "unpruned"), page.get_by_role("slider", name="Stage")
    slider.focus()
    page.keyboard.press("End")
    last = {name: pixels(page, name) for name in ("fastv", "feather")}
    assert card(page, "feather").locator("figcaption:visible").inner_text() == "from layer 4: 13 of 196"
    page.keyboard.press("ArrowLeft")
    assert "after stage 1" in page.locator(".vp-stage").inner_text()
    assert differ(pixels(page, "fastv"), last["fastv"]) < SAME  # it has one
    assert differ(pixels(page, "feather"), last["feather"]) > 0.1
    assert "from layer 2: " in card(page, "feather").locator("figcaption:visible").inner_text()
    page.keyboard.press("Home")
    assert "before any" in page.locator(".vp-stage").inner_text()
    assert all(differ(pixels(page, name), whole) < SAME for name in last)
    assert differ(last["fastv"], whole) > 0.3


def test_another_budget_is_another_picture(page):
    tick(page, "feather")
    ask_own(page)
    assert answer(page, "unpruned") == "9 11 12 14"
    before = pixels(page, "feather")
    page.get_by_label("number input for Budget").fill("130")
    page.keyboard.press("Tab")
    ask(page, lambda: page.get_by_role("button", name="Ask", exact=True).click())
    assert tokens(page, "feather") == pytest.approx(130, abs=2)
    assert differ(before, pixels(page, "feather")) > 0.1


def test_enter_asks_and_ticks_count(page):
    tick(page)
    page.locator("#methods input[value=uniform]").focus()
    page.keyboard.press("Space")
    upload(page, SCENE)
    page.wait_for_selector("#picture img")
    page.get_by_label("Question", exact=True).fill("what color is the small phone ?")
    ask(page, lambda: page.keyboard.press("Enter"))
    assert page.locator(".vp-card h3").all_inner_texts() == ["unpruned", "uniform"]
    assert answer(page, "unpruned") == "it is green"


def test_files_that_are_no_pictures(idle, server, tmp_path):
    whole = SCENE.read_bytes()
    files = {"broken.png": b"no picture at all", "cut.png": whole[: len(whole) // 2], "moves.gif": None}
    Image.new("RGB", (9, 9)).save(tmp_path / "moves.gif")
    for name, data in files.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        upload(idle, tmp_path / name)
        idle.wait_for_selector(f".vp-fault:has-text({name!r})")
        fault = idle.get_by_role("alert").inner_text()
        assert (
            fault == f"picture: expected a whole PNG or JPEG or WebP file, got {name!r}, which cannot be read"
        )
        idle.wait_for_selector("#picture img", state="detached")
    upload(idle, SCENE)
    idle.wait_for_selector(".vp-fault", state="detached")
    assert "Traceback" not in server[2].read_text()


def test_files_that_are_too_large(idle, tmp_path):
    heavy, wide = tmp_path / "heavy.png", tmp_path / "wide.png"
    heavy.write_bytes(SCENE.read_bytes() + bytes(10 * 2**20))
    Image.new("1", (8000, 6000)).save(wide)
    told = {
        heavy: "exceed the maximum allowed size of 10",
        wide: "at most 40 million pixels, got 8000 x 6000",
    }
    for path, words in told.items():
        idle.reload()
        idle.wait_for_selector("#methods input")
        upload(idle, path)
        idle.get_by_text(words).wait_for()


def test_the_server_measures_too(idle, server):
    """A browser that does not look how large a file is."""
    status = idle.evaluate(
        """async (size) => { const form = new FormData();
        form.append('files', new Blob([new Uint8Array(size)], {type: 'image/png'}), 'heavy.png');
        return (await fetch('gradio_api/upload', {method: 'POST', body: form})).status; }""",
        10 * 2**20 + 1,
    )
    assert status == 413
    assert idle.request.get(server[0]).headers["content-security-policy"].startswith("default-src 'self'")


METAS = ('"meta":{"_type":"gradio.FileData"}', '"meta":null', '"meta":{}')


def test_nothing_but_what_was_put_in_is_read(page, server, tmp_path):
    """A browser that says its picture lies somewhere else: a picture of this machine, or one of another."""
    secret = tmp_path / "secret.png"
    Image.new("RGB", (112, 112), (250, 10, 10)).save(secret)
    tick(page)
    ask_own(page)
    before, forged = pixels(page, "unpruned"), []

    def forge(path, meta, route):
        sent = re.sub(r'"path":"[^"]*"', f'"path":"{path}"', route.request.post_data)
        sent = re.sub(r'"meta":\{[^}]*\}', meta, sent)
        forged.append(path in sent and meta in sent)
        route.continue_(post_data=sent)

    for path, meta in product((str(secret), "http://pictures.invalid/a.png"), METAS):
        page.route("**/queue/join*", partial(forge, path, meta))
        page.evaluate("document.querySelectorAll('.vp-fault').forEach(old => old.dataset.old = 'yes')")
        page.get_by_role("button", name="Ask", exact=True).click()
        told = page.wait_for_selector(".vp-fault:not([data-old])").inner_text()
        refused = (
            "picture: expected one that was put in here, got another file",
            "This could not be answered.",
        )
        assert any(words in told for words in refused) and str(tmp_path) not in told
        expect(page.get_by_role("button", name="Ask", exact=True)).to_be_enabled()
        assert answer(page, "unpruned") == "9 11 12 14" and differ(pixels(page, "unpruned"), before) < SAME
        page.unroute("**/queue/join*")
    assert any(forged) and "pictures.invalid" not in server[2].read_text()


def test_nothing_to_ask(page):
    page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_selector(".vp-fault:has-text('picture: expected a picture, got none')")
    upload(page, SCENE)
    page.wait_for_selector("#picture img")
    page.wait_for_selector(".vp-fault", state="hidden")  # the picture has arrived, and with it a new status
    page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_selector(".vp-fault:has-text('question: expected a text of 1 to 1000 letters, got 0')")


def test_two_visitors_at_once_do_not_mix(browser, server):
    with visitor(browser, server[0]) as one, visitor(browser, server[0]) as other:
        one.locator("#methods input[value=visionzip]").uncheck()
        other.get_by_label("number input for Budget").fill("120")
        other.keyboard.press("Tab")
        one.locator("[data-example='0']").click()
        other.locator("[data-example='1']").click()
        for page in (one, other):
            page.wait_for_selector(".vp-copies")
        assert (answer(one, "unpruned"), answer(other, "unpruned")) == ("9 11 12 14", "R Z C")
        assert (one.locator(".vp-card").count(), other.locator(".vp-card").count()) == (4, 5)
        assert tokens(one, "fastv") == pytest.approx(78, abs=1)
        assert tokens(other, "fastv") == pytest.approx(120, abs=1)
        assert one.get_by_label("Question", exact=True).input_value() == QUESTION


def test_another_model(page):
    page.get_by_label("Model").click()
    page.get_by_role("option", name="checkpoint-576").click()
    page.get_by_text("visual tokens of 576").wait_for()
    assert page.get_by_label("number input for Budget").input_value() == "230"
    tick(page, "fastv")
    ask(page, lambda: page.locator("[data-example]").first.click())
    assert tokens(page, "unpruned") == 576 and tokens(page, "fastv") == pytest.approx(230, abs=1)


def test_stop_keeps_what_is_there(page):
    tick(page, *every(page))
    page.locator("[data-example]").first.click()
    page.wait_for_selector(".vp-card:nth-child(2)")
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped").wait_for()
    page.wait_for_timeout(1500)
    assert page.get_by_role("button", name="Ask", exact=True).is_enabled()
    assert page.locator("#status").inner_text().strip() == "Stopped"
    assert 2 <= page.locator(".vp-card").count() < 25 and not page.locator(".vp-copies").count()
    tick(page, "fastv")
    ask(page, lambda: page.get_by_role("button", name="Ask", exact=True).click())
    assert answer(page, "unpruned") == "9 11 12 14"


def test_stop_before_it_is_ones_turn(browser, server):
    with visitor(browser, server[0]) as one, visitor(browser, server[0]) as other:
        tick(one, *every(one))
        one.locator("[data-example='0']").click()
        one.wait_for_selector(".vp-card")
        other.locator("[data-example='1']").click()
        other.get_by_text("Waiting for its turn").wait_for()
        other.get_by_role("button", name="Stop").click()
        other.get_by_text("Stopped").wait_for()
        one.get_by_role("button", name="Stop").click()
        one.get_by_text("Stopped").wait_for()
        other.wait_for_timeout(1500)
        assert other.locator("#status").inner_text().strip() == "Stopped"
        assert not other.locator(".vp-card").count()


def copied(page, what):
    page.get_by_role("button", name=f"Copy the {what}").click()
    page.get_by_text("Copied").wait_for()
    page.get_by_text("Copied").wait_for(state="detached")
    return page.evaluate("navigator.clipboard.readText()")


BOTH = """
import sys
from vlmprune.cli.main import app
app([*sys.argv[2:], "--json"], standalone_mode=False)
exec(sys.argv[1])
"""


def test_what_is_copied_gives_the_same(page, server, tmp_path):
    """In the folder of a picture whose name, and with a question which, a shell would read otherwise."""
    tick(page, "feather", "visionzip")
    ask_own(page, server[1] / "it's.png", 'locate the "green" phone . `$HOME` it\'s')
    names = page.locator(".vp-card h3").all_inner_texts()
    there = [(answer(page, name), tokens(page, name)) for name in names]
    command, python = copied(page, "command"), copied(page, "Python")

    (tmp_path / "vlmprune").write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    (tmp_path / "vlmprune").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = subprocess.check_output(["bash", "-c", command], env=environment(**path), text=True).split("\0")
    run = [sys.executable, "-P", "-c", BOTH, python, *words[:-1]]
    out = subprocess.check_output(run, cwd=server[1], env=environment(), text=True)

    told, *lines = out.splitlines()
    runs = json.loads(told)["runs"]
    assert [(run["answer"], round(run["report"]["tokens"]["mean_per_layer"], 1)) for run in runs] == there
    assert (server[1] / "kept.png").stat().st_size > 0
    unpruned, *rest = (line.split(" | ") for line in lines)
    assert unpruned == ["unpruned", there[0][0]]
    for (policy, said, mean), name, (answered, shown) in zip(rest, names[1:], there[1:], strict=True):
        assert policy.startswith(name) and said == answered and round(float(mean), 1) == shown


def test_a_phone(browser, server):
    with visitor(browser, server[0], viewport={"width": 390, "height": 844}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        tick(page, "visionzip", "feather")
        ask(page, lambda: page.locator("[data-example]").first.click())
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.wait_for_function("document.querySelector('#results').getBoundingClientRect().top < 100")


def test_the_space(browser, tmp_path):
    """What is uploaded, in an environment without this checkout: the package is the one beside the page."""
    folder, port = tmp_path / "space", free_port()
    runpy.run_path(str(ROOT / "examples" / "space" / "pack.py"))["pack"](folder)
    env = environment(GRADIO_SERVER_PORT=str(port), GRADIO_TEMP_DIR=str(tmp_path / "uploads"))
    server = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=env | {"PYTHONSAFEPATH": ""})
    try:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert server.poll() is None
            time.sleep(0.2)
        with visitor(browser, f"http://127.0.0.1:{port}/") as page:
            tick(page, "uniform")
            ask(page, lambda: page.locator("[data-example]").first.click())
            assert answer(page, "unpruned") == "9 11 12 14"
            command = page.locator(".vp-copy pre").first.inner_text()
        assert "--model checkpoint " in command and "--image images/scene_70001.png " in command
        assert list(folder.glob("vlmprune/web/__pycache__/page.*.pyc"))
    finally:
        server.kill()
        server.wait()


def screenshots(folder, scratch):
    """docs/show-desktop.webp and docs/show-phone.webp."""
    sizes = {"desktop": (1440, 1250), "phone": (390, 844)}
    with shown(scratch, here=ROOT) as (address, _), chromium() as browser:
        for name, (width, height) in sizes.items():
            with visitor(browser, address, viewport={"width": width, "height": height}) as page:
                ask(page, lambda page=page: page.locator("[data-example]").first.click())
                page.wait_for_timeout(500)
                shot = Image.open(io.BytesIO(page.screenshot()))
                shot.convert("RGB").save(folder / f"show-{name}.webp", quality=80, method=6)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        screenshots(Path(sys.argv[1]), Path(scratch))
