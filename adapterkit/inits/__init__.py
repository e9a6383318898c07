"""Ways to start an adapter: a method is a file with a frozen record whose fields are its options;
`name` is what users type.

`needs`: what the factors are computed from, the weight and kinds of statistics. A record that needs
nothing has `draw(a_shape, b_shape, generator) -> a, b`; another one has
`factors(weight, rank, scale, **statistics) -> a, b`, with the statistics by their kinds. With
`changes_base` the base of the new adapter is W - scale·b@a, else W. Shapes are those of the file:
a (r, in), b (out, r).
"""
