"""Coverage-guided fuzzing of one reader of `test_hostile.READERS`.

  pip install atheris
  python tests/fuzz_readers.py 'torch, pickle' -max_total_time=600

Flags are libFuzzer's. It starts from the valid file, follows the branches of
`rocl_jax` and pickletools, and stops at the first input on which the reader
does anything but read or refuse; that input stays in the current folder as
`crash-...`. pytest does not collect this file, and nothing else needs atheris.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(
  include=['rocl_jax', 'pickletools', 'zipfile', 'tarfile']
):
  from test_hostile import READERS, REFUSALS, place


def main() -> None:
  name = sys.argv.pop(1) if len(sys.argv) > 1 else ''
  if name not in READERS:
    sys.exit(f'found {name!r}, wanted one of: {"; ".join(READERS)}')
  reader = READERS[name]
  root = Path(tempfile.mkdtemp(prefix='fuzz'))
  inside, corpus = root / 'inside', root / 'corpus'
  inside.mkdir()
  corpus.mkdir()
  content = reader.prepare(inside)
  path = place(inside, reader)
  (corpus / 'valid').write_bytes(content)

  def attempt(mutated: bytes) -> None:
    path.write_bytes(reader.wrap(mutated))
    reader.seal(inside)
    try:
      reader.read(inside)
    except REFUSALS as error:
      assert '\n' not in str(error), error

  limits = [f'-max_len={2 * len(content)}', '-timeout=20', '-rss_limit_mb=4096']
  atheris.Setup([*sys.argv, str(corpus), *limits], attempt)
  atheris.Fuzz()


if __name__ == '__main__':
  main()
