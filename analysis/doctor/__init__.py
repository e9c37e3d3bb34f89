"""What is wrong with routes, from the routes alone or compared with a capture of the same tokens, with evidence."""
