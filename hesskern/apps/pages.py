"""Templates of the HTML pages, and pictures inside them."""

from __future__ import annotations

import base64

import jinja2

__all__ = ["svg_uri", "template"]


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
