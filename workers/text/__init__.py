"""Text to token ids, conversations to ids and roles, documents to rows."""


class Unrenderable(ValueError):
    """A conversation that cannot become tokens with roles: a fault of this one document, not of model or options."""
