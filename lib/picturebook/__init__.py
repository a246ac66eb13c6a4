"""The embedded picture-book world: scenes, drawing, annotation and training."""
