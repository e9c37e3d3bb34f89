"""A capture: from options to identity and layout, from text to planned rows, in this process."""
