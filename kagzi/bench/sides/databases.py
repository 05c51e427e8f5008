"""A peer's own database on the server that we use, too; dropped at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo


@contextmanager
def own_database(conninfo: str, name: str) -> Iterator[str]:
    """The connection string of a new database of this name; what had the name is dropped."""
    drop = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(drop)
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        try:
            yield make_conninfo(conninfo, dbname=name)
        finally:
            connection.execute(drop)


def url_of(conninfo: str) -> str:
    """The same as a URL, which the peers' libraries want."""
    parts = {key: str(value) for key, value in conninfo_to_dict(conninfo).items()}
    user, password = parts.pop("user", ""), parts.pop("password", "")
    database, host, port = parts.pop("dbname", ""), parts.pop("host", ""), parts.pop("port", "")
    who = quote(user, safe="") + (f":{quote(password, safe='')}" if password else "")
    at = f"{who}@" if who else ""
    if host.startswith("/"):
        parts |= {"host": host} | ({"port": port} if port else {})
        where = ""
    else:
        where = host + (f":{port}" if port else "")
    options = "&".join(f"{key}={quote(value, safe='')}" for key, value in parts.items())
    return f"postgresql://{at}{where}/{quote(database, safe='')}{'?' if options else ''}{options}"
