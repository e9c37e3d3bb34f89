"""Text to token ids, conversations to ids and roles, documents to rows."""


class Unrenderable(ValueError):
    """A conversation that cannot become tokens with roles: a fault of this document, not of the model or the
    options."""
