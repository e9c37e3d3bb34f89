"""The sections of the report, in the page's order: one line each."""

from analysis.report.section import Section
from analysis.report.sections import caching, confidence, contrast, glance, load, paths, position, repetition, tokens

SECTIONS: tuple[Section, ...] = (
    glance.SECTION,
    load.SECTION,
    tokens.SECTION,
    contrast.SECTION,
    paths.SECTION,
    repetition.SECTION,
    confidence.SECTION,
    position.SECTION,
    caching.SECTION,
)
