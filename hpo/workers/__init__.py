"""Workers: the loop, its two runners, and how workers start, are watched and end, here or on Ray."""
