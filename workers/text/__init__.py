"""Text to token ids, conversations to ids and roles, documents to rows."""
