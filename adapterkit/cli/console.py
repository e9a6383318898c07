"""Text on consoles and in files whose encoding lacks some letters, such as code page 1252: a
readable stand-in, and never an error."""

import codecs
import io
import sys
import unicodedata

PLAIN = {
    "‖": "||", "Δ": "delta", "δ": "delta", "Σ": "sum", "σ": "sigma", "Ω": "Omega", "θ": "theta",
    "γ": "gamma", "τ": "tau", "η": "eta", "ε": "eps", "λ": "lambda", "α": "alpha", "β": "beta",
    "ρ": "rho",
    "≈": "~", "≤": "<=", "≥": ">=", "−": "-", "⁻": "-", "₋": "-", "±": "+-", "·": "*", "×": "x",
    "⊗": "x", "⊙": "*", "∗": "*", "∘": "o", "•": "*", "→": "->", "←": "<-", "½": "1/2", "¼": "1/4",
    "√": "sqrt", "∞": "inf", "∈": "in", "°": "deg", "⟨": "<", "⟩": ">", "—": "-",
    "\N{EN DASH}": "-", "█": "#", "▓": "%", "▒": "=", "░": "-",
}  # fmt: skip


def never_fail() -> None:
    """Let what is printed have stand-ins where the stream's encoding lacks a letter."""
    codecs.register_error("adapterkit", _stand_in)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # somebody may have put something else there
            stream.reconfigure(errors="adapterkit")


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(map(_plain, letters)), error.end


def _plain(letter: str) -> str:
    if letter in PLAIN or unicodedata.combining(letter):
        return PLAIN.get(letter, "")
    return unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode() or "?"
