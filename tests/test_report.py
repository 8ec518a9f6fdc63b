"""The report: what is in it, and how a real browser takes it."""

import asyncio
import base64
import dataclasses
import html.parser
import io
import os
import pathlib
import shutil
import signal
import subprocess

import aiohttp
import numpy as np
import PIL.Image
import pytest

from clip_jax.errors import UserError
from clip_jax.evaluation.report import Classified, Retrieved, confusion, most_confused, some_of, write_report


class Browser:
    """A headless Chromium, by its DevTools protocol; `told` collects what it has to say."""

    def __init__(self, program: str, folder: pathlib.Path):
        self.program, self.folder, self.told = program, folder, []

    async def __aenter__(self):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
        command = [self.program, *flags, "--remote-debugging-port=0", f"--user-data-dir={self.folder}", "about:blank"]
        # A session of its own, so that the processes that it starts end with it.
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            await self.connect()
        except BaseException:
            self.kill()
            raise
        return self

    async def connect(self):
        port = self.folder / "DevToolsActivePort"
        while not (port.exists() and port.read_text().count("\n")):
            assert self.process.poll() is None, "the browser ended before it listened"
            await asyncio.sleep(0.05)
        self.session = aiohttp.ClientSession()
        async with self.session.get(f"http://127.0.0.1:{port.read_text().split()[0]}/json/list") as answer:
            page = next(target for target in await answer.json() if target["type"] == "page")
        self.socket = await self.session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
        for domain in ("Page", "Network", "Log", "Runtime"):
            await self.call(f"{domain}.enable")

    async def __aexit__(self, *error):
        await self.socket.close()
        await self.session.close()
        self.kill()

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    async def call(self, method: str, **parameters):
        number = self.number = getattr(self, "number", 0) + 1
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self.socket.receive_json()
            if message.get("id") == number:
                return message["result"]
            self.told.append(message)

    async def open(self, file: pathlib.Path, width: int, scheme: str = "light"):
        await self.call("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 600)
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        await self.call("Page.navigate", url=file.as_uri())
        while not any(message["method"] == "Page.loadEventFired" for message in self.told):
            self.told.append(await self.socket.receive_json())

    async def evaluate(self, script: str):
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        return answer["result"]["value"]


NASTY = """<script>alert(1)</script>"><img src=x onerror='alert(2)'>&amp; "quoted" \N{RIGHT-TO-LEFT OVERRIDE}"""
HOSTILE = (NASTY, "'; DROP", "a" * 300, "עברית", "half a pair \ud83d", "</style></table>", "new\nline\tand tab", "\N{DOG FACE}")


def picture(i: int) -> PIL.Image.Image:
    """Of every size and mode, an own colour each."""
    size, mode = ((300, 200), (40, 500), (1, 1), (64, 64))[i % 4], ("RGB", "RGBA", "L", "P")[i % 4]
    return PIL.Image.new("RGB", size, (i * 37 % 256, i * 91 % 256, 128)).convert(mode)


def classified(classes: int = 40, count: int = 400, hostile: bool = True) -> Classified:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, count)
    # Errors prefer the next class, as confusions do.
    predictions = np.where(rng.random(count) < 0.6, labels, (labels + rng.geometric(0.6, count)) % classes)
    margins = np.where(labels == predictions, 1, -1) * rng.random(count)
    names = [f"{HOSTILE[i % len(HOSTILE)] if hostile else 'class'} {i}" for i in range(classes)]
    return Classified("labelled " + NASTY, names, labels, predictions, margins, picture)


def retrieved() -> Retrieved:
    rng = np.random.default_rng(1)
    owners = np.repeat(np.arange(12), 2)
    captions = [f"{i}: {HOSTILE[i % len(HOSTILE)]}" for i in range(24)]
    similarity = rng.normal(size=(12, 12)) * 0.4 + 0.3 * np.eye(12)
    best_images = dict(enumerate(np.argsort(-similarity[:, owners].T, axis=1)[:, :3]))
    best_texts = dict(enumerate(np.argsort(-rng.random((12, 24)), axis=1)[:, :3]))
    best_texts[0][1] = 1  # the second caption of the first picture is found
    shown = [{i: found[i] for i in some_of(len(found))} for found in (best_images, best_texts)]
    return Retrieved("captioned " + NASTY, 12, captions, owners, *shown, picture, similarity)


RECORDS = [
    {
        "dataset": "wds/" + NASTY,
        "model": "ViT-B-32",
        "pretrained": "runs/" + NASTY,
        "task": "zeroshot_classification",
        "metrics": {
            "acc1": 0.6125, "acc1_chance": 0.025, "acc1_interval": 0.0477, "acc5": 0.9, "acc5_chance": 0.125, "perplexity": 12.345678,
            "a_very_long_name_of_a_measure_that_nobody_shortened@1000": 1.0, "missing": None, NASTY: float("nan"),
        },
        "language": "en",
    },
    {"dataset": "other", "model": "ViT-B-32", "pretrained": "b", "task": "retrieval", "metrics": {"recall": 0.5}, "language": "en"},
]  # fmt: skip


class Parsed(html.parser.HTMLParser):
    """The elements, their attributes and the text of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.tables, self.text, self.open = [], [], "", []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br", "wbr", "rect", "line"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append((dict(attributes).get("class"), []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][1][-1].append("")

    handle_startendtag = handle_starttag

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} closes what it did not open"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][1][-1][-1] += data


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> pathlib.Path:
    place = tmp_path_factory.mktemp("report") / "new" / "report.html"
    write_report(place, "Results " + NASTY, RECORDS, [classified(), retrieved(), classified(3, 30, hostile=False)])
    return place


@pytest.fixture(scope="module")
def parsed(file) -> Parsed:
    page = Parsed(file.read_text(encoding="utf-8"))
    assert not page.open
    return page


def test_every_picture_is_inside_and_small(parsed, file):
    sources = [attributes for tag, attributes in parsed.elements if tag == "img"]
    assert len(sources) >= 24 + 24 + 8 * 3 + 8 + 2
    for attributes in sources:
        kind, data = attributes["src"].split(",", 1)
        assert kind in ("data:image/webp;base64", "data:image/png;base64")
        with PIL.Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as opened:
            opened.load()
            assert opened.size == (int(attributes["width"]), int(attributes["height"]))
            assert max(opened.size) <= (128 if kind.startswith("data:image/webp") else 256)
        assert "alt" in attributes
    assert file.stat().st_size < 150_000  # measured 95 kB


def test_nothing_points_outside_and_nothing_runs(parsed, file):
    page = file.read_text()
    assert "http://" not in page and "https://" not in page and "url(" not in page and "@import" not in page
    ids = {attributes.get("id") for _, attributes in parsed.elements}
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "audio", "video", "source"}
    for tag, attributes in parsed.elements:
        assert not any(name.startswith("on") or name in ("srcset", "action", "background") for name in attributes), (tag, attributes)
        assert attributes.get("src", "data:image/").startswith("data:image/")
        if "href" in attributes:
            assert attributes["href"][0] == "#" and attributes["href"][1:] in ids


def test_names_are_text_whatever_they_hold(parsed):
    for place in ("Results ", "labelled ", "captioned ", "wds/", "runs/", "taken for ", "0: "):
        assert place + NASTY in parsed.text, place
    assert "</style></table>" in parsed.text and "half a pair ?" in parsed.text and "a" * 300 not in parsed.text
    alts = [attributes["alt"] for tag, attributes in parsed.elements if tag == "img"]
    assert any(NASTY in alt for alt in alts)


def counts(rows: list[list[str]]) -> np.ndarray:
    return np.array([[int(cell or 0) for cell in row[1:]] for row in rows[1:]])


def test_the_confusion_map_adds_up(parsed):
    maps = [rows for kind, rows in parsed.tables if kind == "confusion"]
    large, small = classified(), classified(3, 30, hostile=False)
    assert [counts(rows).sum() for rows in maps] == [400, 30]
    assert [counts(rows).shape for rows in maps] == [(21, 21), (3, 3)]
    chosen = most_confused(large.labels, large.predictions, 20)
    whole = np.zeros((40, 40), int)
    np.add.at(whole, (large.labels, large.predictions), 1)
    np.testing.assert_array_equal(counts(maps[0])[:20, :20], whole[np.ix_(chosen, chosen)])
    np.testing.assert_array_equal(counts(maps[0]).sum(axis=1)[:20], whole.sum(axis=1)[chosen])
    inner = [counts(maps[0])[:20, :20], counts(maps[1])]  # what lies outside is not coloured
    right = sum((np.diag(cells) > 0).sum() for cells in inner)
    kinds = [attributes.get("class") for tag, attributes in parsed.elements if tag == "td"]
    assert (kinds.count("right"), kinds.count("wrong")) == (right, sum((cells > 0).sum() for cells in inner) - right)
    assert [row[0] for row in maps[1][1:]] == [small.class_names[i] for i in most_confused(small.labels, small.predictions, 20)]


def test_the_commonest_errors_are_chosen_first():
    labels, predictions = np.array([5, 5, 5, 1, 1, 7, 7, 3]), np.array([2, 2, 2, 4, 4, 2, 7, 3])
    assert most_confused(labels, predictions, 20) == [5, 2, 1, 4, 7]  # never 3, which is always right
    assert most_confused(labels, predictions, 2) == [5, 2]
    assert most_confused(labels, labels, 20) == []
    assert confusion(labels, predictions, [5, 2], 8).tolist() == [[0, 3, 0], [0, 0, 0], [0, 1, 4]]


def test_recall_by_hand(tmp_path):
    labels = np.repeat(np.arange(30), 4)
    predictions = np.where(np.arange(120) % 4 < np.minimum(labels, 4), labels, 29)  # 0, 1, 2, 3, then all of 4
    part = Classified("set", [f"class {i}" for i in range(30)], labels, predictions, np.zeros(120), picture)
    write_report(tmp_path / "r.html", "t", [], [part])
    worst, best = (rows[1:] for kind, rows in Parsed((tmp_path / "r.html").read_text()).tables if kind is None)
    assert [row[1:] for row in worst[:4]] == [[f"{25 * i}.00\u2009%", f"{i} of 4"] for i in range(4)]
    assert len(worst) == len(best) == 10 and not {row[0] for row in worst} & {row[0] for row in best}


def test_results_show_chance_and_interval_where_there_are_any(parsed):
    rows = {row[0]: row[1:] for row in parsed.tables[0][1]}
    assert rows["acc1"] == ["61.25\u2009%", "4.77\u2009%", "2.50\u2009%"] and rows["acc5"] == ["90.00\u2009%", "–", "12.50\u2009%"]
    assert rows["perplexity"] == ["12.35", "–", "–"] and rows["missing"] == rows[NASTY] == ["–"] * 3
    assert not any("chance" in name or "interval" in name for name in rows)


def test_margins_are_ordered_and_the_right_ones_are_marked(parsed):
    part, text = classified(), parsed.text
    order = np.argsort(part.margins)
    places = [text.index(f"{part.margins[i]:+.3f}".replace("-", "−")) for i in (*order[:12], *order[::-1][:12])]
    assert places == sorted(places)
    sheets = retrieved()
    asked = np.linspace(0, 23, 8).round().astype(int)
    found = sum(sheets.owners[t] in sheets.best_images[t] for t in asked)
    assert 0 < found < 8 and text.count("✓ its picture") == found and text.count("✗ its picture, missed") == 8 - found
    best = [sheets.owners[sheets.best_texts[i]] == i for i in np.linspace(0, 11, 8).round().astype(int)]
    assert text.count("✓ ") - text.count("✓ found") - found == text.count("(its own)") == np.sum(best) > 0
    assert text.count("✗ its own, missed:") == 8 - np.any(best, axis=1).sum() > 0
    alts = [attributes["alt"] for tag, attributes in parsed.elements if tag == "img"]
    assert [int(alt.split()[1].strip(",")) for alt in alts[:24]] == [*order[:12], *order[::-1][:12]]


def test_small_and_empty_sets_and_the_same_bytes_again(tmp_path):
    def empty(*shape):
        return np.zeros(shape, np.int64)

    parts = [
        Classified("none", ["a"], empty(0), empty(0), np.zeros(0), picture),
        Classified("one", ["a"], empty(1), empty(1), np.zeros(1), picture),
        Retrieved("none", 0, [], empty(0), {}, {}, picture, None),
        Retrieved("no map", 0, [], empty(0), {}, {}, picture, np.zeros((0, 0))),
        Retrieved("one", 1, ["a"], empty(1), {0: empty(1)}, {0: empty(1)}, picture, np.ones((1, 1))),
    ]
    for name in "ab":
        write_report(tmp_path / name, "Small", [], parts)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert "nan" not in Parsed((tmp_path / "a").read_text()).text


def test_what_cannot_be_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    for place in (tmp_path, tmp_path / "taken" / "r.html"):
        with pytest.raises(UserError, match="the report cannot be written"):
            write_report(place, "t", [], [])
    with pytest.raises(UserError, match="labels: expected places from 0 to 2, found 0 to 39"):
        dataclasses.replace(classified(), class_names=["a", "b", "c"])
    with pytest.raises(UserError, match="margins: expected finite numbers, found 400"):
        dataclasses.replace(classified(), margins=np.full(400, np.nan))
    with pytest.raises(UserError, match="best_texts: expected places from 0 to 23, found 24"):
        dataclasses.replace(retrieved(), best_texts={0: np.full(3, 24)})


# The least contrast of text with what is behind it (WCAG 2.2, 1.4.3), ground by ground from the root.
CONTRAST = """(() => {
  const numbers = color => { const n = color.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  let least = [99, ""];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    if (!walker.currentNode.data.trim()) continue;
    const chain = [];
    for (let e = walker.currentNode.parentElement; e; e = e.parentElement) chain.unshift(numbers(getComputedStyle(e).backgroundColor));
    const ground = chain.reduce((under, over) => [0, 1, 2].map(i => over[i] * over[3] + under[i] * (1 - over[3])), [255, 255, 255]);
    const [a, b] = [luminance(ground), luminance(numbers(getComputedStyle(walker.currentNode.parentElement).color))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < least[0]) least = [ratio, walker.currentNode.data.trim().slice(0, 40)];
  }
  return least;
})()"""
LAYOUT = """(() => {
  const out = [...document.querySelectorAll("body *")].filter(
    e => !e.closest(".wide table, svg") && e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5);
  return {
    scroll: document.scrollingElement.scrollWidth, width: document.documentElement.clientWidth,
    out: out.map(e => e.outerHTML.slice(0, 80)), images: [...document.images].map(i => i.complete && i.naturalWidth),
    hacked: document.querySelectorAll("script").length };
})()"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here: apt-get install chromium")
def test_a_browser_takes_it(file, tmp_path):
    async def visit():
        async with Browser(shutil.which("chromium"), tmp_path / "profile") as browser:
            for width, scheme in ((390, "light"), (390, "dark"), (1200, "light")):
                browser.told.clear()
                await browser.open(file, width, scheme)
                layout, contrast = await browser.evaluate(LAYOUT), await browser.evaluate(CONTRAST)
                dark = await browser.evaluate("getComputedStyle(document.body).backgroundColor")
                yield width, scheme, layout, contrast, dark, list(browser.told)

    async def all_of_it():
        return [seen async for seen in visit()]

    for width, scheme, layout, contrast, ground, told in asyncio.run(asyncio.wait_for(all_of_it(), 60)):
        assert layout["images"] and all(layout["images"]) and layout["hacked"] == 0
        assert layout["width"] <= width and layout["scroll"] <= layout["width"] and not layout["out"], layout["out"]
        said = [m for m in told if m["method"] in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")]
        assert not said, said
        asked = {m["params"]["request"]["url"] for m in told if m["method"] == "Network.requestWillBeSent"}
        assert {url for url in asked if not url.startswith("data:")} == {file.as_uri()}
        assert contrast[0] >= 4.5, contrast  # measured 5.22 in light, 4.78 in dark: links
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 24, 28)"}[scheme]
