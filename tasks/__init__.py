"""Prefect tasks: thin skins over the pipeline's steps. Each logs, performs a step, and writes its artifact."""
