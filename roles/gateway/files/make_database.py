"""Make the gateway's role and database on the operator's SQL server, if they are not there.

Run by the gateway's own Python; reads one JSON object from standard input, so that no password is ever an argument.
Prints `ready` when the gateway gets in already, `made` when that took something, `missing` in check mode.
"""

import json
import sys

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict


def connect(place, user, password, database):
    return psycopg.connect(
        host=place["host"],
        port=place.get("port", 5432),
        user=user,
        password=password,
        dbname=database,
        connect_timeout=5,
        autocommit=True,
        application_name="citadel-gateway deploy",
    )


def make(place, given):
    """The server gets a verifier instead of the password, so that its log cannot hold that either."""
    with connect(place, given["admin_user"], given["admin_password"], given["admin_database"]) as admin:
        user, database = sql.Identifier(place["user"]), sql.Identifier(place["dbname"])
        verifier = admin.pgconn.encrypt_password(
            given["password"].encode(), place["user"].encode(), b"scram-sha-256"
        ).decode()
        there = admin.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [place["user"]]).fetchone()
        verb = sql.SQL("ALTER" if there else "CREATE")
        admin.execute(sql.SQL("{} ROLE {} LOGIN PASSWORD {}").format(verb, user, sql.Literal(verifier)))
        if not admin.execute("SELECT 1 FROM pg_database WHERE datname = %s", [place["dbname"]]).fetchone():
            # An administrator who is no superuser may give a database to a role only while he is in it.
            admin.execute(sql.SQL("GRANT {} TO CURRENT_USER").format(user))
            admin.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(database, user))
            admin.execute(sql.SQL("REVOKE {} FROM CURRENT_USER").format(user))
            admin.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(database))


def main():
    given = json.load(sys.stdin)
    place = conninfo_to_dict(given["url"].replace("postgresql+psycopg:", "postgresql:", 1))
    where = f"{place['host']}:{place.get('port', 5432)}"
    try:
        connect(place, place["user"], given["password"], place["dbname"]).close()
    except psycopg.OperationalError as error:
        reason = str(error).strip().splitlines()[-1]
    else:
        print("ready")
        return 0
    if given["check"]:
        print(f"missing: {reason}")
        return 0
    if not given["admin_user"]:
        print(
            f"The gateway does not get into the database {place['dbname']} of {where} as {place['user']}: {reason}\n"
            "Set gateway_database_admin_user and its password to have role and database made, or run there:\n"
            f"  CREATE ROLE {place['user']} LOGIN PASSWORD '(gateway_database_password)';\n"
            f"  CREATE DATABASE {place['dbname']} OWNER {place['user']};",
            file=sys.stderr,
        )
        return 1
    try:
        make(place, given)
        connect(place, place["user"], given["password"], place["dbname"]).close()
    except psycopg.Error as error:
        told = str(error).strip().splitlines()[-1]
        print(f"{where}, as {given['admin_user']} (gateway_database_admin_user): {told}", file=sys.stderr)
        return 1
    print("made")
    return 0


sys.exit(main())
