"""Ways to start an adapter: a method is a file with a frozen record whose fields are its options;
`name` is what users type.

`needs`: what the factors are computed from, the weight and kinds of statistics. A record that needs
nothing has `draw(a_shape, b_shape, generator) -> a, b`; another one has
`factors(weight, rank, scale, **statistics) -> a, b`, with the statistics by their kinds. With
`changes_base` the base of the new adapter is W - scale·b@a, else W. Shapes are those of the file:
a (r, in), b (out, r).

Optional: `kinds`, the layers on which the method is defined (linear, embedding, conv, experts);
`triplets_per_rank`, how many singular triplets each rank takes (1); `draws`, whether `factors`
takes a `generator`; `redistributes`, whether ranks go where the statistics say
(`adapterkit.tasks.redistribution`). Without "weight" among the needs, `factors` gets a weight
without values. It raises ValueError for statistics that it cannot use.
"""
