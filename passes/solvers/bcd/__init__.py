"""Block coordinate descent: one engine, many problems (Nutini, Laradji and Schmidt, JMLR 23(131), 2022)."""
