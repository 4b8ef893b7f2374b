"""The table of routers, from the rows as they are kept."""

from typing import Any

from rich.table import Table


def tables(content: dict[str, Any]) -> list[Table]:
    """The rows, those of one kind of composite together, and the twins."""
    return [
        *(_rows_table(content, kind) for kind in ("routed", "mixture")),
        _twins_table(content["twins"]),
    ]


def _rows_table(content: dict[str, Any], kind: str) -> Table:
    context, seed = content["context_length"], content["seed"]
    base = content.get("base", {}).get("foreign")
    title = f"{kind}: context {context}, seed {seed}, {content['windows']} windows, "
    title += f"{content['device']}" + (f"; base on foreign text {base:.3f}" if base else "")
    table = Table(title=title, title_justify="left")
    headings = ("k", "loss", "regret", "own", "NMI", "load", "fit s", "decode", "ms")
    table.add_column("router")
    for heading in (*headings, "foreign", "switch regret", "own after 8 / 16 / 32 / 64"):
        table.add_column(heading, justify="right")
    for row in content["rows"]:
        if row["composite"] == kind:
            table.add_row(*_cells(row))
    return table


def _cells(row: dict[str, Any]) -> list[str]:
    shares = " / ".join(f"{share:.2f}" for share in row["switch"]["share_at"].values())
    loss = sum(row["loss"].values()) / len(row["loss"])
    names = ("own_domain_share", "normalized_mutual_information", "load_entropy")
    return [
        row["router"],
        str(row["k"]),
        f"{loss:.4f}",
        f"{row['regret']:.4f}",
        *(f"{row[name]:.2f}" for name in names),
        _shown(row["fit_seconds"] or None, ".1f"),
        _shown(row["decode_overhead"], "+.1%"),
        _shown(row.get("decode_milliseconds"), "+.2f"),
        _shown(row["foreign_loss"], ".3f"),
        f"{row['switch']['regret']:.4f}",
        shares,
    ]


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _twins_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="two experts of one domain", title_justify="left")
    for heading in ("router", "domain", "to a", "to b", "to others", "loss", "only a", "only b"):
        table.add_column(heading, justify="left" if heading in ("router", "domain") else "right")
    for row in rows:
        shares, alone = row["shares"], row["loss_of_one"]
        values = [f"{shares[name]:.2f}" for name in ("a", "b", "others")]
        losses = [f"{value:.4f}" for value in (row["loss"], alone["a"], alone["b"])]
        table.add_row(row["key"], row["domain"], *values, *losses)
    return table
