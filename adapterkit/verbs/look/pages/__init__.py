"""Pages and pictures as text: HTML and SVG of names and numbers, without script and network."""
