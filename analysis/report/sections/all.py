"""The sections of the report, in the page's order, one line each."""

from importlib import import_module

from analysis.report.section import Section

NAMES = (
    "glance",
    "load",
    "tokens",
    "token_classes",
    "contrast",
    "paths",
    "repetition",
    "confidence",
    "distribution",
    "saliency",
    "surprise",
    "effect",
    "position",
    "caching",
)
SECTIONS: tuple[Section, ...] = tuple(import_module(f"analysis.report.sections.{name}").SECTION for name in NAMES)
