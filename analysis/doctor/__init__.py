"""What is wrong with routes, from the routes alone or beside a capture of the same tokens, each fault with evidence."""
