"""The parts of the page, one function each: from a Run to a Section."""
