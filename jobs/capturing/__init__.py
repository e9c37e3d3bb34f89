"""Captures: from options to identity and layout, and from text to planned rows."""
