"""A PostgreSQL database that others have roles in: what of theirs we execute, which is nothing unless we say so."""

from urllib.parse import urlsplit

import psycopg
import pytest

from speval import load_evals, retry, speval
from speval.errors import DatabaseError, OptionError
from speval.options import checked_database
from speval.stores import make_control
from speval.stores.copying import copy
from speval.url import PostgresUrl

from .conftest import server_url

# What our statements call, with types that fit better than those of pg_catalog, where any do.
SHADOWS = """
CREATE TABLE public.loot (role text);
GRANT ALL ON public.loot TO PUBLIC;
CREATE FUNCTION public.steal() RETURNS void LANGUAGE sql AS 'INSERT INTO public.loot VALUES (current_user)';
CREATE FUNCTION public.unnest(text[]) RETURNS SETOF text LANGUAGE sql AS 'SELECT public.steal(); SELECT pg_catalog.unnest($1)';
CREATE FUNCTION public.unnest(bigint[]) RETURNS SETOF bigint
    LANGUAGE sql AS 'SELECT public.steal(); SELECT pg_catalog.unnest($1)';
CREATE FUNCTION public.pg_notify(text, text) RETURNS void LANGUAGE sql AS 'SELECT public.steal()';
CREATE FUNCTION public.hashtext(text) RETURNS integer LANGUAGE sql AS 'SELECT public.steal(); SELECT 1';
CREATE FUNCTION public.to_regclass(text) RETURNS regclass
    LANGUAGE sql AS 'SELECT public.steal(); SELECT pg_catalog.to_regclass($1)';
CREATE FUNCTION public.setval(regclass, bigint) RETURNS bigint
    LANGUAGE sql AS 'SELECT public.steal(); SELECT pg_catalog.setval($1, $2)';
CREATE FUNCTION public.pg_advisory_xact_lock(integer, integer) RETURNS void LANGUAGE sql AS 'SELECT public.steal()';
CREATE FUNCTION public.current_setting(text) RETURNS text
    LANGUAGE sql AS 'SELECT public.steal(); SELECT pg_catalog.current_setting($1)';
CREATE FUNCTION public.same(text, text) RETURNS boolean
    LANGUAGE sql AS 'SELECT public.steal(); SELECT $1 OPERATOR(pg_catalog.=) $2';
CREATE OPERATOR public.= (LEFTARG = text, RIGHTARG = text, FUNCTION = public.same);
CREATE FUNCTION public.more(bigint, integer) RETURNS boolean
    LANGUAGE sql AS 'SELECT public.steal(); SELECT $1 OPERATOR(pg_catalog.>) $2';
CREATE OPERATOR public.> (LEFTARG = bigint, RIGHTARG = integer, FUNCTION = public.more);
CREATE FUNCTION public.as_text(text) RETURNS text LANGUAGE sql AS 'SELECT public.steal(); SELECT $1';
CREATE DOMAIN public.text AS pg_catalog.text CHECK (public.as_text(VALUE) IS NOT NULL);
"""


class Town:
    """A database with two roles that may create in it."""

    def __init__(self, postgres, namespace: str) -> None:
        self.postgres, self.name = postgres, namespace
        self.victim, self.mallory = f"{namespace}_victim", f"{namespace}_mallory"
        self.admin("CREATE DATABASE {name}", "postgres")
        for role in (self.victim, self.mallory):
            self.admin(f"CREATE ROLE {role} LOGIN", "postgres")
            self.admin(f"GRANT CREATE ON DATABASE {{name}} TO {role}", "postgres")
        self.admin("GRANT ALL ON SCHEMA public TO {mallory}")

    def admin(self, sql: str, database: str | None = None):
        return self._as("postgres", database or self.name, sql)

    def as_mallory(self, sql: str):
        return self._as(self.mallory, self.name, sql)

    def as_victim(self, sql: str):
        return self._as(self.victim, self.name, sql)

    def url(self, role: str, **more: str) -> str:
        return self.postgres.url(self.name, **more).replace("postgres@", f"{role}@")

    def _as(self, role: str, database: str, sql: str):
        url = self.postgres.url(database).replace("postgres@", f"{role}@")
        with psycopg.connect(url, autocommit=True) as connection:
            sql = sql.format(name=self.name, victim=self.victim, mallory=self.mallory)
            found = connection.execute(sql)
            return found.fetchall() if found.description else None


@pytest.fixture
def town(postgres, namespace):
    return Town(postgres, namespace)


def use_all(url: str) -> None:
    """Do what can be done with a database, but for what a terminal shows of it."""

    def function(args: int) -> int:
        if args == 2:
            raise ValueError(args)
        return args

    assert speval(function, {"a": 1, "b": 2}, url, progress=False).failed == 1
    assert speval(function, {"a": 1, "b": 3, "c": 4}, url, on_changed="rerun", progress=False).recorded == 2
    assert retry(url, ["b"], status="completed") == 1
    assert [e["name"] for e in load_evals(url)] == ["a", "b", "c"]
    with make_control(checked_database(url), "write") as control:
        control.set_paused(True)
        control.set_paused(False)
        assert control.overview().total == 3
        assert control.check().findings is not None
        assert len(list(control.evaluations(pattern="*"))) == 3
        assert len(control.attempts("a")) == 1
        assert control.drop(["b"]) == 1


def test_code_in_the_search_path_is_never_executed(town, tmp_path):
    town.as_mallory(SHADOWS)
    town.admin("ALTER ROLE {victim} SET search_path = public, pg_catalog")
    assert town.as_victim("SELECT current_setting('search_path')") == [("public, pg_catalog",)]
    assert town.as_mallory("DELETE FROM public.loot WHERE role IS NOT NULL RETURNING 1") == [(1,)]  # the trap is set
    url = town.url(town.victim, namespace="mine")
    use_all(url)
    copy(url, tmp_path / "copy.db")
    copy(tmp_path / "copy.db", town.url(town.victim, namespace="back"))
    assert town.admin("SELECT * FROM public.loot") == []


def test_a_schema_of_another_role_is_refused_unless_the_url_names_its_owner(town):
    schema = "speval_theirs"
    town.as_mallory(f"CREATE SCHEMA {schema}; GRANT ALL ON SCHEMA {schema} TO {{victim}}")
    url = town.url(town.victim, namespace="theirs")
    for use in (lambda: speval(abs, [1], url), lambda: load_evals(url)):
        with pytest.raises(DatabaseError, match=rf"belongs to the role {town.mallory}.*add owner={town.mallory} to the URL"):
            use()
    assert town.admin(f"SELECT count(*) FROM pg_class WHERE relnamespace = '{schema}'::regnamespace") == [(0,)]
    trusting = town.url(town.victim, namespace="theirs", owner=town.mallory)
    assert speval(abs, [1], trusting, progress=False).completed == 1


def test_superusers_and_members_of_the_owner_refuse_it_too(town):
    assert speval(abs, [1], town.url(town.mallory, namespace="hers"), progress=False).completed == 1
    town.admin("GRANT {mallory} TO {victim}")
    for role in ("postgres", town.victim):
        with pytest.raises(DatabaseError, match="belongs to the role"):
            load_evals(town.url(role, namespace="hers"))


TRAPS = {
    "a row policy": ("ALTER TABLE {s}.attempts ENABLE ROW LEVEL SECURITY", "attempts has a row level security policy"),
    "a rule": ("CREATE RULE r AS ON INSERT TO {s}.queue DO ALSO NOTHING", "queue has a rule"),
    "a trigger": (
        """
        CREATE FUNCTION {s}.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
        CREATE TRIGGER t BEFORE INSERT ON {s}.running FOR EACH ROW EXECUTE FUNCTION {s}.f()
        """,
        "running has a trigger",
    ),
    "a view": (
        "ALTER TABLE {s}.attempts RENAME TO a; CREATE VIEW {s}.attempts AS SELECT * FROM {s}.a",
        "attempts should be a table",
    ),
    "a child": ("CREATE TABLE {s}.child () INHERITS ({s}.evaluations)", "evaluations has another table that inherits"),
    "a function": (
        "CREATE OR REPLACE FUNCTION {s}.clock() RETURNS double precision LANGUAGE sql AS 'SELECT 1.0::double precision'",
        r"clock\(\) differs from that of this release",
    ),
    "an overload": ("CREATE FUNCTION {s}.movers(integer) RETURNS integer LANGUAGE sql AS 'SELECT 1'", r"movers\(\) differs"),
    "a right to create": ("GRANT CREATE ON SCHEMA {s} TO {mallory}", "REVOKE CREATE ON SCHEMA"),
    "a right to triggers": ("GRANT ALL ON {s}.queue TO {mallory}", "REVOKE TRIGGER ON ALL TABLES"),
    "a foreign owner": ("ALTER TABLE {s}.workers OWNER TO {mallory}", r"workers belongs to the role"),
}


def test_each_object_of_a_schema_is_checked_before_it_is_read(town):
    for number, (trap, (sql, problem)) in enumerate(TRAPS.items()):
        url = town.url(town.victim, namespace=f"trap{number}")
        speval(abs, [1], url, progress=False)
        town.admin(sql.replace("{s}", f"speval_trap{number}"))
        for use in (lambda: load_evals(url), lambda: speval(abs, [1], url, progress=False)):
            with pytest.raises(DatabaseError, match=problem):
                use()
                pytest.fail(trap)


def test_a_policy_created_after_the_check_is_an_error_and_executes_nothing(town):
    url = town.url(town.victim, namespace="late")
    speval(abs, [1], url, progress=False)
    town.admin("GRANT USAGE ON SCHEMA speval_late TO {mallory}; GRANT SELECT ON ALL TABLES IN SCHEMA speval_late TO {mallory}")
    with make_control(checked_database(town.url(town.mallory, namespace="late", owner=town.victim))) as control:
        town.as_victim("CREATE POLICY p ON speval_late.evaluations USING (true)")
        town.as_victim("ALTER TABLE speval_late.evaluations ENABLE ROW LEVEL SECURITY")
        with pytest.raises(DatabaseError, match="row-level security"):
            list(control.evaluations())


@pytest.mark.parametrize(
    "text",
    [
        "host=db dbname=runs password=sesame",
        "dbname=runs",
        "host='/run/a b' user=me dbname=x",
        " service=mine ",
        "sslmode=require host=x",
    ],
)
def test_a_libpq_connection_string_is_refused_with_the_url_form(text):
    with pytest.raises(OptionError, match="write it as a URL: postgresql://USER@HOST:PORT/DBNAME") as caught:
        speval(abs, [1], text)
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("text", ["user=a", "host=a b=c", "a=b.db", "folder/host=a.db"])
def test_a_file_name_may_contain_an_equals_sign(text):
    assert not isinstance(checked_database(text), PostgresUrl)


def test_an_invalid_libpq_option_is_refused_with_the_valid_values(url_of):
    with pytest.raises(OptionError, match="sslmode is one of prefer, disable, allow, require, verify-ca, verify-full"):
        speval(abs, [1], url_of("sslmode=nonsense"))
    with pytest.raises(DatabaseError, match=r'invalid.* option.*"nonsense"'):
        speval(abs, [1], url_of("nonsense=1"))
    with pytest.raises(DatabaseError, match='definition of service "nonsense" not found'):
        speval(abs, [1], "postgresql:///?service=nonsense")


@pytest.fixture
def url_of(postgres):
    def url(query: str) -> str:
        base = server_url(postgres.url())
        assert urlsplit(base).query == ""
        return f"{base}?{query}"

    return url
