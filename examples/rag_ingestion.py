"""Documents are embedded in the background, while questions about them go first.

    python examples/rag_ingestion.py

Ingestion and questions share one key. Calls for questions have the priority "interactive", because a
person waits for them. Calls for ingestion have the priority "batch", and take whatever is left.

You need no key: a provider on this machine answers, and refuses calls above its limits with 429. Its
minute lasts only three seconds, so that you don't wait long.
To use OpenAI, remove the provider, `api_base` and `api_key`, and set OPENAI_API_KEY.

Needs: pip install "asyncbucket[openai,testing]"
"""

import asyncio
import time

from llama_index.core import Document, VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.openai import OpenAI

from asyncbucket import Limiter
from asyncbucket.testing import RateLimitedProvider

# For a real key, write "500 RPM", "200k TPM", or whatever your account says.
limiter = Limiter("60 requests/3s", "40k tokens/3s", concurrency=16, name="openai")
ingestion = limiter.child("ingestion", priority="batch")
questions = limiter.child("questions", priority="interactive")

MANUAL = [
    Document(text=f"Chapter {n}. " + f"Part {n} of the pump is to be oiled every {n} days. " * 40)
    for n in range(1, 91)
]


async def main() -> None:
    """Ingest a manual, and meanwhile answer questions about its first chapters."""
    with RateLimitedProvider(rpm=60, tpm=40_000, minute=3, latency=(0.05, 0.2)) as provider:
        url = provider.base_url
        # One request embeds `embed_batch_size` texts, and each batch is one admission.
        embedding = OpenAIEmbedding(embed_batch_size=8, api_base=url, api_key="any")
        llm = questions.wrap(
            OpenAI(model="gpt-4o-mini", max_tokens=200, api_base=url, api_key="any")
        )

        # The same model twice, behind two children: embedding the manual is not urgent, embedding a
        # question is.
        slowly, at_once = ingestion.wrap(embedding), questions.wrap(embedding)
        pipeline = IngestionPipeline(
            transformations=[SentenceSplitter(chunk_size=128, chunk_overlap=0), slowly]
        )
        first = await pipeline.arun(documents=MANUAL[:5])
        index = VectorStoreIndex(first, embed_model=at_once)
        rest = asyncio.create_task(pipeline.arun(documents=MANUAL[5:]))

        engine = index.as_query_engine(llm=llm, similarity_top_k=2)
        for n in range(1, 6):
            await asyncio.sleep(0.3)  # a person thinks
            start = time.monotonic()
            await engine.aquery(f"How often is part {n} to be oiled?")
            waiting = ingestion.statistics().waiting
            print(f"answered in {time.monotonic() - start:.2f} s; {waiting} batches in line behind")

        index.insert_nodes(await rest)

    seen = provider.statistics()
    print(
        f"{len(index.docstore.docs)} chunks in {seen.requests} calls, {seen.refused} refused (429)"
    )
    for each in (ingestion, questions):
        now = each.statistics()
        waited = sum(waits.seconds for waits in now.waits.values())
        print(f"{now.name}: {now.admitted} calls, {waited / now.admitted:.2f} s in line on average")


if __name__ == "__main__":
    asyncio.run(main())
