"""The app of a Hugging Face Space: the page of `padseg demo`, open to everybody."""

from padseg.demo.app import serve
from padseg.demo.settings import Settings

if __name__ == '__main__':
    serve(Settings(host='0.0.0.0', models=('tiny',), max_seconds=30.0, public=True), print)
