"""The command that tells what the code of an error means."""

import click

from adapterkit.core.errors import Refused, codes, did_you_mean, shown


@click.command()
@click.argument("code", required=False)
def explain(code: str | None) -> None:
    """Print what the code of an error means.

    And how it comes about, what to do, and an example; without CODE the list of all codes.

    \b
    Example:
      adapterkit explain AK401
    """
    known = codes()
    if code is None:
        for name, entry in known.items():
            click.echo(f"{name}  {entry['title']}")
        return
    name = code.strip("[]").upper()
    if name not in known:
        hint = did_you_mean([name], known) or "`adapterkit explain` lists all"
        raise Refused(
            f"no code {shown(code)}",
            expected=f"{min(known)} to {max(known)}",
            hint=hint,
            code="AK101",
        )
    entry = known[name]
    lines = [f"{name}: {entry['title']}", "", f"How it comes about: {entry['cause']}"]
    lines += [f"What to do: {entry['do']}", "", *entry["example"].splitlines()]
    click.echo("\n".join(lines))
