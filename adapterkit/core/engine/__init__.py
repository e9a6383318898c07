"""Engines run the steps of a plan.

An engine is a function `(plan, how, check, push) -> Receipt` that makes the output of a plan in the
folder `how.out` of this machine's file system; `doors.ENGINES` has them by the names of
`--engine`. It guarantees:

- The bytes equal those of every other engine: a tensor is a function of the plan alone.
- The folder appears whole, by one rename (`execute.run`), or not at all. `check`, if given,
  inspects the finished folder before; `push` sends it after, and the same job retries it.
- `Refused` before anything is written, `Failed` or `Interrupted` after: then `how.resume` continues
  with the finished files, and `how.overwrite` starts again.
- An `Unrecoverable` error, such as an input that changed, leaves nothing to resume.

Dry runs, outputs on the Hub and the plan itself are handled before an engine is called. Engines of
several processes only need `many.workers`: prepare, one worker per process, finish.
"""
