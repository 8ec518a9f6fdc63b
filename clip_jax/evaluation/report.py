"""A report of results for people: one HTML file with its pictures inside, without scripts, that asks nothing of any server."""

import base64
import dataclasses
import functools
import html
import io
import math
import pathlib
from collections.abc import Callable, Sequence

import jax
import matplotlib
import numpy as np
import PIL.Image
from jaxtyping import Float, Int

import clip_jax
from clip_jax import images
from clip_jax.errors import UserError

THUMBNAIL = 128  # pixels of the longer side
MAPPED = 20  # classes of a confusion map
RANKED = 10  # classes of lowest recall, and of highest
MARGINS = 12  # pictures of lowest margin, and of highest
ASKED = 8  # captions whose nearest pictures are shown, and pictures whose nearest captions are
HEATED = 128  # rows of the similarity map
LONGEST = 160  # characters of a caption or a name


@dataclasses.dataclass(frozen=True)
class Classified:
    """The pictures of one labelled set, and what they were taken for."""

    name: str
    class_names: list[str]
    labels: Int[np.ndarray, "N"]  # into `class_names`
    predictions: Int[np.ndarray, "N"]
    margins: Float[np.ndarray, "N"]  # cosine of the true class, less that of the best other one
    picture: Callable[[int], PIL.Image.Image]

    def __post_init__(self):
        for what in ("labels", "predictions"):
            _check(f"{self.name}: {what}", getattr(self, what), len(self.class_names))
        _check(f"{self.name}: margins", self.margins)


@dataclasses.dataclass(frozen=True)
class Retrieved:
    """The pictures and captions of one set, and what was nearest to some of each (`some_of`)."""

    name: str
    pictures: int  # how many there are
    captions: list[str]
    owners: Int[np.ndarray, "T"]  # the picture that each caption is of
    best_images: dict[int, Int[np.ndarray, "K"]]  # of a caption, nearest first
    best_texts: dict[int, Int[np.ndarray, "L"]]  # of a picture, nearest first, into `captions`
    picture: Callable[[int], PIL.Image.Image]
    similarity: Float[np.ndarray, "R R"] | None = None  # cosines of some pictures (rows) and their first captions (columns)

    def __post_init__(self):
        _check(f"{self.name}: owners", self.owners, self.pictures)
        for what, size in (("best_images", self.pictures), ("best_texts", len(self.captions))):
            _check(f"{self.name}: {what}", np.ravel([*getattr(self, what).values()]), size)
        if self.similarity is not None:
            _check(f"{self.name}: similarity", self.similarity)


def _check(where: str, values: np.ndarray, size: int | None = None) -> None:
    """Places have to be below `size`, other numbers finite."""
    if size is None and not np.isfinite(values).all():
        raise UserError(f"{where}: expected finite numbers, found {np.sum(~np.isfinite(values))} that are not; look at the features")
    if size is not None and values.size and not 0 <= values.min() <= values.max() < size:
        raise UserError(f"{where}: expected places from 0 to {size - 1}, found {values.min()} to {values.max()}; mend its caller")


def write_report(file: pathlib.Path, title: str, records: list[dict], parts: Sequence[Classified | Retrieved]) -> None:
    """Writes the report; the same results give the same bytes.

    Args:
      records: CLIP_benchmark's.  A metric NAME may have its chance level beside it as NAME_chance, and half the
        width of its 95 % confidence interval as NAME_interval.
      parts: what the sections after the table are about.

    Raises:
      UserError: the file cannot be written.
    """
    page = _page(title, records, parts).encode("utf-8", "replace")  # half a surrogate pair, from the name of a file, becomes "?"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(page)
    except OSError as error:
        raise UserError(f"{file}: the report cannot be written ({error.strerror}); take another path") from error


def _page(title: str, records: list[dict], parts: Sequence[Classified | Retrieved]) -> str:
    links = "".join(f'<li><a href="#part{i}">{_text(part.name)}</a></li>' for i, part in enumerate(parts, 1))
    contents = f'<nav aria-label="Contents"><ul><li><a href="#results">Results</a></li>{links}</ul></nav>' if parts else ""
    model, weights = (", ".join(dict.fromkeys(_text(record[field]) for record in records)) or "–" for field in ("model", "pretrained"))
    facts = {"Model": model, "Weights": weights, "Versions": f"clip_jax {clip_jax.__version__}, jax {jax.__version__}"}
    header = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    sections = ""
    for i, part in enumerate(parts, 1):
        body = _classified(part) if isinstance(part, Classified) else _retrieved(part)
        sections += f'<section id="part{i}"><h2>{_text(part.name)}</h2>{body}</section>\n'
    # The policy makes the browser refuse what this file should never ask for.
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">\n"""
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{_text(title)}</h1><dl>{header}</dl>{contents}</header>\n<main>\n"
        f'<section id="results"><h2>Results</h2>{_results(records)}</section>\n{sections}</main>\n</body>\n</html>\n'
    )


def _escape(value: object) -> str:
    """Anything from data, as one line that is nothing but text, not too long."""
    line = " ".join(str(value).split())
    return html.escape(line if len(line) <= LONGEST else line[: LONGEST - 1] + "…")


def _text(value: object) -> str:
    """The same, in a writing direction of its own."""
    return f"<bdi>{_escape(value)}</bdi>"


def _results(records: list[dict]) -> str:
    """The table of results, and the bar of each."""
    if not records:
        return "<p>There are none.</p>"
    told = [field for field in ("model", "pretrained", "language") if len({str(record.get(field)) for record in records}) > 1]
    bodies = []
    for record in records:
        metrics = record["metrics"]
        about = " · ".join(_text(record[field]) for field in ("task", *told) if record.get(field))
        rows = "".join(_result(name, metrics) for name in metrics if not name.endswith(("_chance", "_interval")))
        head = f'<th scope="rowgroup" colspan="4">{_text(record["dataset"])} <span class="quiet">{about}</span></th>'
        bodies.append(f"<tbody><tr>{head}</tr>{rows}</tbody>")
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("Measure", "Result", "± 95 %", "Chance"))
    samples = {
        "the result, of 100 %": '<rect class="bar" y="4" width="100%" height="6"/>',
        "its 95 % confidence interval": '<line class="interval" x1="0" x2="100%" y1="7" y2="7"/>',
        "chance": '<line class="chance" x1="50%" x2="50%" y1="1" y2="13"/>',
    }
    key = "".join(f'<span><svg class="sample" aria-hidden="true">{drawn}</svg> {name}</span>' for name, drawn in samples.items())
    return f'<table><thead><tr>{heads}</tr></thead>{"".join(bodies)}</table><p class="key">{key}</p>'


def _result(name: str, metrics: dict) -> str:
    value, interval, chance = (_number(metrics.get(name + suffix)) for suffix in ("", "_interval", "_chance"))
    share = value is not None and 0 <= value <= 1
    cells = "".join(f"<td>{_format(number, share)}</td>" for number in (value, interval, chance))
    label = _text(name).replace("_", "_<wbr>") + (_bar(value, interval, chance) if share else "")
    return f'<tr><th scope="row">{label}</th>{cells}</tr>'


def _number(value: object) -> float | None:
    """A metric as a number; anything else that a record may hold counts as missing."""
    real = isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if real else None


def _format(value: float | None, share: bool) -> str:
    return "–" if value is None else f"{value:.2%}".replace("%", "\u2009%") if share else f"{value:.4g}"


def _bar(share: float, interval: float | None = None, chance: float | None = None) -> str:
    """A share of one as a bar, behind its interval and the level of chance.  The numbers stand beside it."""
    drawn = f'<rect class="track" y="4" width="100%" height="6"/><rect class="bar" y="4" width="{share:.2%}" height="6"/>'
    if interval is not None:
        low, high = max(share - interval, 0), min(share + interval, 1)
        drawn += f'<line class="interval" x1="{low:.2%}" x2="{high:.2%}" y1="7" y2="7"/>'
    if chance is not None:
        drawn += f'<line class="chance" x1="{chance:.2%}" x2="{chance:.2%}" y1="1" y2="13"/>'
    return f'<svg class="meter" aria-hidden="true">{drawn}</svg>'


def _thumbnail(picture: PIL.Image.Image, alt: str) -> str:
    small = images.on_background(picture)
    small.thumbnail((THUMBNAIL, THUMBNAIL), PIL.Image.Resampling.LANCZOS)
    return _image(small, alt, "WEBP", quality=80, method=6)


def _image(picture: PIL.Image.Image, alt: str, kind: str, **options: object) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/{kind.lower()};base64,{data}" width="{picture.width}" height="{picture.height}" alt="{_escape(alt)}">'


def _classified(part: Classified) -> str:
    if not len(part.labels):
        return "<p>It has no pictures.</p>"
    right = np.sum(part.labels == part.predictions)
    least = np.argsort(part.margins, kind="stable")
    shown = min(MARGINS, (len(least) + 1) // 2)
    return (
        f"<p>Of {len(part.labels):,} pictures, {right:,} are given the right one of {len(part.class_names):,} classes.</p>"
        f"<h3>Most confused classes</h3>{_confusion(part)}{_recalls(part)}"
        "<h3>Furthest from their class</h3><p>The number is the margin: the cosine of the true class, less that of the best other one.</p>"
        f"{_gallery(part, least[:shown])}<h3>Surest of their class</h3>{_gallery(part, least[shown:][-shown:][::-1])}"
    )


def most_confused(labels: Int[np.ndarray, "N"], predictions: Int[np.ndarray, "N"], count: int) -> list[int]:
    """The classes of the commonest errors, those that are taken for each other side by side.

    Pairs of a true and a predicted class are taken by their number of errors; where it is the same, those go first
    whose classes have more errors of any kind.
    """
    wrong = labels != predictions
    pairs, errors = np.unique(np.stack([labels[wrong], predictions[wrong]]), axis=1, return_counts=True)
    of_class = np.bincount(pairs.ravel(), np.tile(errors, 2))
    order = np.lexsort((-of_class[pairs].sum(axis=0), -errors))
    return list(dict.fromkeys(pairs[:, order].T.ravel().tolist()))[:count]


def confusion(
    labels: Int[np.ndarray, "N"], predictions: Int[np.ndarray, "N"], classes: list[int], total: int
) -> Int[np.ndarray, "M M"]:
    """How often each class (row) was taken for each (column); the last row and column are all others of the `total`."""
    place = np.full(total, len(classes))
    place[classes] = np.arange(len(classes))
    counts = np.zeros((len(classes) + 1,) * 2, np.int64)
    np.add.at(counts, (place[labels], place[predictions]), 1)
    return counts


def _confusion(part: Classified) -> str:
    classes = most_confused(part.labels, part.predictions, MAPPED)
    if not classes:
        return "<p>None: every picture is taken for what it is.</p>"
    counts = confusion(part.labels, part.predictions, classes, len(part.class_names))
    names = [_text(part.class_names[i]) for i in classes]
    if counts[-1].any() or counts[:, -1].any():
        names.append("<i>all others</i>")
    heads = "".join(f'<th scope="col"><span>{name}</span></th>' for name in names)
    rows = []
    for i, name in enumerate(names):
        cells = []
        for j in range(len(names)):
            share = counts[i, j] / max(counts[i].sum(), 1)
            kind = "" if max(i, j) >= len(classes) or not share else "right" if i == j else "wrong"
            shade = f' class="{kind}" style="--share:{share:.2f}"' if kind else ""
            cells.append(f"<td{shade}>{counts[i, j] or ''}</td>")
        rows.append(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>')
    return (
        f"<p>Rows are what a picture is, columns what it is taken for; cells count pictures. The {len(classes)} classes are those of the "
        "commonest errors.</p>"
        '<div class="wide" role="region" tabindex="0" aria-label="Confusion map"><table class="confusion"><thead>'
        f'<tr><td></td>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        '<p class="key"><span><i class="ramp wrong"></i> wrong</span><span><i class="ramp right"></i> right</span>'
        "<span>from none to all of the row</span></p>"
    )


def _recalls(part: Classified) -> str:
    """Tables of the classes that are found least, and most; of all where they are few."""
    size = len(part.class_names)
    pictures = np.bincount(part.labels, minlength=size)
    right = np.bincount(part.labels[part.labels == part.predictions], minlength=size)
    there = np.flatnonzero(pictures)
    # Among equals, a class with more pictures says more.
    worst = there[np.lexsort((-pictures[there], right[there] / pictures[there]))]
    best = there[np.lexsort((-pictures[there], -right[there] / pictures[there]))]
    few = {"Lowest recall": worst[:RANKED], "Highest recall": best[~np.isin(best, worst[:RANKED])][:RANKED]}
    tables = {"Recall": best} if len(there) <= 2 * RANKED else few
    drawn = []
    for name, classes in tables.items():
        rows = "".join(
            f'<tr><th scope="row">{_text(part.class_names[i])}{_bar(right[i] / pictures[i])}</th>'
            f"<td>{_format(right[i] / pictures[i], True)}</td><td>{right[i]:,} of {pictures[i]:,}</td></tr>"
            for i in classes
        )
        heads = '<th scope="col">Class</th><th scope="col">Recall</th><th scope="col">Pictures</th>'
        drawn.append(f"<div><h3>{name}</h3><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>")
    return f'<div class="pair">{"".join(drawn)}</div>'


def _gallery(part: Classified, chosen: Int[np.ndarray, "A"]) -> str:
    figures = []
    for i in chosen.tolist():
        true, taken = part.class_names[part.labels[i]], part.class_names[part.predictions[i]]
        found = part.labels[i] == part.predictions[i]
        verdict = '<span class="yes">✓ found</span>' if found else f'<span class="no">✗ taken for</span> {_text(taken)}'
        caption = f'<b>{_text(true)}</b><br>{verdict}<br><span class="quiet">{_signed(part.margins[i])}</span>'
        figures.append(f"<figure>{_thumbnail(part.picture(i), f'picture {i}, {true}')}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="gallery">{"".join(figures)}</div>' if figures else "<p>There are no more pictures.</p>"


def _signed(value: float | np.floating) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _retrieved(part: Retrieved) -> str:
    picture = functools.cache(lambda i: _thumbnail(part.picture(i), f"picture {i}"))
    return (
        f"<p>{part.pictures:,} pictures, {len(part.captions):,} captions.</p>"
        f"<h3>Pictures found for a caption</h3>{''.join(_pictures_of(part, t, picture) for t in part.best_images)}"
        f"<h3>Captions found for a picture</h3>"
        f'<div class="pair">{"".join(_captions_of(part, i, picture) for i in part.best_texts)}</div>'
        f"{'' if part.similarity is None or not part.similarity.size else _heat(part.similarity[:HEATED, :HEATED])}"
    )


def some_of(size: int) -> list[int]:
    """Places spread evenly over all, so that nobody has picked them."""
    return np.unique(np.linspace(0, size - 1, min(ASKED, size)).round().astype(int)).tolist()


def _pictures_of(part: Retrieved, caption: int, picture: Callable[[int], str]) -> str:
    owner, figures = part.owners[caption], []
    for rank, i in enumerate(part.best_images[caption].tolist(), 1):
        mark = '<span class="yes">✓ its picture</span>' if i == owner else ""
        figures.append(f"<figure{' class=sought' if i == owner else ''}>{picture(i)}<figcaption>{rank} {mark}</figcaption></figure>")
    if owner not in part.best_images[caption]:
        mark = '<span class="no">✗ its picture, missed</span>'
        figures.append(f'<figure class="missed">{picture(int(owner))}<figcaption>{mark}</figcaption></figure>')
    return f'<h4>{_text(part.captions[caption])}</h4><div class="gallery found">{"".join(figures)}</div>'


def _captions_of(part: Retrieved, i: int, picture: Callable[[int], str]) -> str:
    items, missed, own = "", "", np.flatnonzero(part.owners == i)
    for t in part.best_texts[i].tolist():
        before, after = ('<span class="yes">✓</span> ', ' <span class="yes">(its own)</span>') if t in own else ("", "")
        items += f"<li>{before}{_text(part.captions[t])}{after}</li>"
    if len(own) and not np.isin(own, part.best_texts[i]).any():
        missed = f'<p><span class="no">✗ its own, missed:</span> {_text(part.captions[own[0]])}</p>'
    return f'<div class="asked">{picture(i)}<div><ol>{items}</ol>{missed}</div></div>'


def _heat(similarity: Float[np.ndarray, "R R"]) -> str:
    low, high, own = similarity.min(), similarity.max(), np.eye(len(similarity), dtype=bool)
    others = f"; with those of others, {_signed(similarity[~own].mean())}" if len(similarity) > 1 else ""
    told = f"{_signed(similarity[own].mean())} on average{others}"
    palette = matplotlib.colormaps["viridis"](np.arange(256), bytes=True)[:, :3].tobytes()
    levels = ((similarity - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8)
    drawn = []
    for pixels, alt in ((levels, f"Map of cosines; of pictures and their own captions {told}"), (np.arange(256, dtype=np.uint8)[None], "")):
        picture = PIL.Image.fromarray(pixels)
        picture.putpalette(palette)
        drawn.append(_image(picture, alt, "PNG", optimize=True))
    return (
        f"<h3>Similarity</h3><p>Rows are {len(similarity)} pictures, columns their captions in the same order. The cosine of a picture and "
        f'its own caption, on the diagonal, is {told}.</p><div class="heat">{drawn[0]}'
        f'<p class="key">{_signed(low)}{drawn[1]}{_signed(high)}</p></div>'
    )


# On either ground, and on shaded cells too, text has a contrast of 4.5 or more.
STYLE = """\
:root { --page: 255 255 255; --ink: #1c2127; --quiet: #59636e; --line: #dce1e6; --track: #e9edf1; --bar: #2f6fb0; --yes: #1a6b3c;
  --no: #a63d14; --right: 132 182 232; --wrong: 244 162 97; }
@media screen and (prefers-color-scheme: dark) { :root { --page: 21 24 28; --ink: #e4e8ec; --quiet: #9ba6b1; --line: #333a42;
  --track: #2a3038; --bar: #4a88c7; --yes: #6cc48f; --no: #f09a6a; --right: 35 88 142; --wrong: 150 68 20; } }
* { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 62rem; padding: clamp(1.5rem, 5vw, 4rem) clamp(1rem, 4vw, 2.5rem); background: rgb(var(--page));
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  font-variant-numeric: tabular-nums lining-nums; overflow-wrap: anywhere; }
h1, h2, h3 { font-weight: 650; line-height: 1.25; break-after: avoid; }
h1 { margin: 0 0 1.5rem; font-size: clamp(1.6rem, 4vw, 2.2rem); letter-spacing: -.015em; }
h2 { margin: 4.5rem 0 1rem; padding-top: 1.25rem; border-top: 1px solid var(--line); font-size: 1.4rem; }
h3 { margin: 2.75rem 0 .75rem; font-size: 1.05rem; } h4 { margin: 1.75rem 0 .6rem; font: inherit; break-after: avoid; }
p { margin: 0 0 1rem; max-width: 40rem; } a { color: var(--bar); text-underline-offset: .2em; } b { font-weight: 600; color: var(--ink); }
.quiet, figcaption, dt, .key, thead th { color: var(--quiet); } .yes { color: var(--yes); font-weight: 600; } .no { color: var(--no); }
dl, nav ul, .key { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem 1.5rem; margin: 0; padding: 0; list-style: none; }
dl { gap: .75rem 3rem; } dt { font-size: .8rem; } dd { margin: 0; } nav ul { margin-top: 1.75rem; }
.key { margin-top: .9rem; font-size: .85rem; } table { border-collapse: collapse; width: 100%; } tr, figure, .asked { break-inside: avoid; }
th, td { padding: .45rem 0 .45rem 1rem; text-align: right; vertical-align: top; font-weight: 400; white-space: nowrap; }
th:first-child { padding-left: 0; width: 99%; text-align: left; white-space: normal; }
thead th { padding-bottom: .6rem; font-size: .8rem; border-bottom: 1px solid var(--line); }
th[scope=rowgroup] { padding-top: 1.5rem; font-weight: 650; } th .quiet { font-weight: 400; font-size: .85rem; }
svg { height: 14px; overflow: visible; } .meter { display: block; width: 100%; } .sample { width: 1.75rem; vertical-align: -1px; }
.track { fill: var(--track); } .bar { fill: var(--bar); } .interval { stroke: var(--ink); } .chance { stroke: var(--no); }
line { stroke-width: 1.75; } .wide { overflow-x: auto; } :focus-visible { outline: 2px solid var(--bar); outline-offset: 2px; }
.confusion { width: auto; font-size: .8rem; line-height: 1.2; } .confusion :is(th, td) { vertical-align: middle; }
.confusion tbody th { position: sticky; left: 0; width: auto; min-width: 7rem; max-width: 12rem; padding: .2rem .6rem .2rem 0;
  background: rgb(var(--page)); }
.confusion thead th { padding: 0 0 .5rem; border: 0; vertical-align: bottom; font-size: inherit; color: inherit; }
.confusion thead span { display: block; margin: auto; max-height: 11rem; writing-mode: vertical-rl; transform: rotate(180deg);
  overflow: hidden; text-overflow: ellipsis; }
.confusion tbody td { min-width: 1.75rem; height: 1.75rem; padding: 0 .2rem; border: 1px solid var(--line); text-align: center; }
td.right { background: rgb(var(--right) / var(--share)); } td.wrong { background: rgb(var(--wrong) / var(--share)); }
.ramp { display: inline-block; width: 4rem; height: .7rem; vertical-align: -1px; border: 1px solid var(--line); }
.ramp.right { background: linear-gradient(90deg, rgb(var(--page)), rgb(var(--right))); }
.ramp.wrong { background: linear-gradient(90deg, rgb(var(--page)), rgb(var(--wrong))); }
.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 0 3.5rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(7.6rem, 27%), 1fr)); gap: 1.5rem 1rem; }
.found { grid-template-columns: repeat(auto-fill, minmax(min(6rem, 21%), 1fr)); gap: .75rem; }
figure { margin: 0; } figcaption { margin-top: .4rem; font-size: .8rem; line-height: 1.35; }
img { display: block; width: 100%; height: auto; } :is(figure, .asked) img { aspect-ratio: 1; object-fit: contain; border-radius: 4px; }
.sought img { outline: 3px solid var(--yes); outline-offset: 2px; } .missed img { outline: 2px dashed var(--no); outline-offset: 2px; }
.asked { display: grid; grid-template-columns: 6rem 1fr; align-items: start; gap: 1.25rem; margin-bottom: 2rem; font-size: .9rem; }
ol { margin: 0; padding-left: 1.4rem; } .asked p { margin: .4rem 0 0 .2rem; } .heat { max-width: 28rem; }
.heat img { image-rendering: pixelated; } .heat .key { flex-wrap: nowrap; } .heat .key img { flex: 1; min-width: 0; height: .7rem; }
@media print { body { padding: 0; max-width: none; font-size: .85rem; } nav { display: none; } .wide { overflow: visible; }
  td, i, img { -webkit-print-color-adjust: exact; print-color-adjust: exact; } h2 { margin-top: 2.5rem; } }
"""
