"""How many nodes of which kind does a trace need under an SLO, and how sure is that?"""
