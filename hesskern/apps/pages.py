"""Templates of the HTML pages, and pictures inside them."""

from __future__ import annotations

import base64
import io

import jinja2
import matplotlib.image
import numpy as np

__all__ = ["picture_uri", "svg_uri", "template"]


def template(name: str) -> jinja2.Template:
    """A template of the package; values are escaped, and missing ones are errors."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hesskern.apps", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def svg_uri(svg: bytes) -> str:
    """An SVG as an image of its own, so that ids of different figures cannot meet."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def picture_uri(pixels: np.ndarray) -> str:
    """Pixels in [0, 1], [H, W] or [H, W, 3], as a PNG image."""
    stream = io.BytesIO()
    matplotlib.image.imsave(
        stream, pixels, cmap="gray", vmin=0, vmax=1, format="png", metadata={"Software": "hesskern"}
    )
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
