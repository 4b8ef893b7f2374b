"""Which linear layers of a decoder block are meant by `ffn`, `attention`, `all` or globs."""

from fnmatch import fnmatchcase

from moiety.errors import InputError

SITES = ("ffn", "attention", "all")


def check_sites(sites: str) -> None:
    """Raise InputError unless `sites` is a site's name or globs over module names."""
    parts = [part.strip() for part in sites.split(",")]
    globs = all(any(sign in part for sign in "*._") for part in parts)
    if sites not in SITES and not globs:
        raise InputError(
            f"sites must be one of {', '.join(SITES)}, or comma-separated globs over module names "
            f"such as *.down_proj, but it is {sites!r}"
        )


def at_sites(name: str, sites: str) -> bool:
    """Whether the linear layer called `name` within its block is one that `sites` names."""
    if sites == "all":
        return True
    if sites in SITES:
        return site_of(name) == sites
    globs = [part.strip() for part in sites.split(",")]
    return any(fnmatchcase(spelling, glob) for glob in globs for spelling in (name, f".{name}"))


def site_of(name: str) -> str:
    """Whether a linear layer belongs to `attention` or `ffn`, by the modules it stands in."""
    parts = name.lower().split(".")
    return "attention" if any("attn" in part or "attention" in part for part in parts) else "ffn"
