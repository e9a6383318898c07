"""Where a plan's steps run.

An engine is a function `(plan, how, check, push) -> Receipt` that makes the output of a plan in the
folder `how.out` of this machine's file system; `doors.ENGINES` has them by the names of
`--engine`. What it owes:

- The bytes are those of every other engine: a tensor is a function of the plan alone.
- The folder appears whole, by one rename (`execute.run`), or not at all. `check`, if any, looks
  at the finished folder before; `push` sends it after, and is tried again by the same job.
- `Refused` before anything is written, `Failed` or `Interrupted` after: then `how.resume` goes on
  with the files that are done, and `how.overwrite` begins again.
- An `Unrecoverable` error, such as an input that changed, leaves nothing to resume.

Dry runs, outputs on the Hub and the plan itself are settled before an engine is called. Engines of
several processes need no more than `many.workers`: prepare, a worker a process, finish.
"""
