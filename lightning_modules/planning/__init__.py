"""`quiver plan`: what a run needs in memory and traffic, from its configuration alone, before anything is loaded."""
