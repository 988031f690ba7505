"""A stand-in for gcloud: queued resources whose workers are local processes.

It takes the flags of the real `gcloud compute tpus queued-resources` that
launch/tpu uses, and refuses others; keeps the state in $FAKE_CLOUD; and runs
remote commands as a worker would see them: in a home folder of its own, with
the variables by which JAX finds the others. A resource comes after some looks,
as the real one does: WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE; and goes by
SUSPENDING and SUSPENDED. Of its own it has

  fake_gcloud.py preempt NAME [--look_alive]    kill -9 of all, SUSPENDING
"""

import contextlib
import json
import os
import pathlib
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

CLOUD = pathlib.Path(os.environ['FAKE_CLOUD'])
FLAGS = {
  'create': {
    'zone', 'project', 'quiet', 'accelerator-type', 'runtime-version',
    'node-id', 'node-count', 'node-prefix', 'spot', 'valid-until-duration',
    'network', 'async',
  },
  'describe': {'zone', 'project', 'quiet', 'format'},
  'delete': {'zone', 'project', 'quiet', 'force', 'async'},
  'scp': {'zone', 'project', 'quiet', 'worker', 'node', 'batch-size'},
  'ssh': {
    'zone', 'project', 'quiet', 'worker', 'node', 'batch-size', 'command',
    'ssh-flag',
  },
}  # fmt: skip
# What a look at a resource in this state finds the next time.
NEXT = {
  'WAITING_FOR_RESOURCES': 'PROVISIONING',
  'PROVISIONING': 'ACTIVE',
  'SUSPENDING': 'SUSPENDED',
  'DELETING': None,
}


def fail(message, status=1):
  print(f'ERROR: (gcloud) {message}', file=sys.stderr)
  sys.exit(status)


def parse(verb, arguments):
  positional, flags = [], {}
  for argument in arguments:
    if argument.startswith('--'):
      name, _, value = argument[2:].partition('=')
      if name not in FLAGS[verb]:
        fail(f'unrecognized arguments: {argument}', 2)
      flags[name] = value
    else:
      positional.append(argument)
  if 'zone' not in flags:
    fail('argument --zone: Must be specified', 2)
  return positional, flags


def path_of(name):
  return CLOUD / name / 'resource.json'


def read(name):
  try:
    return json.loads(path_of(name).read_text())
  except FileNotFoundError:
    return None


def write(name, resource):
  path = path_of(name)
  if resource is None:
    return path.unlink()
  path.parent.mkdir(parents=True, exist_ok=True)
  new = path.with_suffix('.new')
  new.write_text(json.dumps(resource))
  new.replace(path)


def free_ports():
  while True:
    with socket.socket() as one, socket.socket() as two:
      one.bind(('127.0.0.1', 0))
      with contextlib.suppress(OSError, OverflowError):
        two.bind(('127.0.0.1', one.getsockname()[1] + 1))
        return one.getsockname()[1]


def create(name, flags):
  if read(name):
    fail(f'ALREADY_EXISTS: Resource {name} already exists')
  if ('node-id' in flags) == ('node-count' in flags):
    fail('Exactly one of (--node-id | --node-count) must be specified', 2)
  slices = int(flags.get('node-count', 1))
  if 'node-count' in flags and slices < 2:
    fail('--node-count must be greater than 1', 2)
  born = CLOUD / name / str(time.time_ns())  # new disks every time
  workers = int(os.environ.get('FAKE_WORKERS', 2))
  for i in range(slices * workers):
    (born / f'worker{i}').mkdir(parents=True)
  write(
    name,
    {
      'state': os.environ.get('FAKE_FIRST_STATE', 'WAITING_FOR_RESOURCES'),
      'born': str(born),
      'slices': slices,
      'workers': workers,
      'port': free_ports(),
      'spot': 'spot' in flags,
    },
  )


def describe_node(name):
  resource = read(name) or read(name.rpartition('-')[0])
  if not resource:
    fail(f'NOT_FOUND: Resource {name} was not found')
  alive = resource['state'] == 'ACTIVE' and not resource.get('looks_alive')
  print('READY' if alive else 'PREEMPTED')


def describe(name):
  resource = read(name)
  if not resource:
    fail(f'NOT_FOUND: Resource {name} was not found')
  print(resource['state'])
  if resource['state'] in NEXT:
    resource['state'] = NEXT[resource['state']]
    write(name, resource if resource['state'] else None)


def delete(name, flags):
  resource = read(name)
  if not resource:
    fail(f'NOT_FOUND: Resource {name} was not found')
  if resource['state'] == 'ACTIVE' and 'force' not in flags:
    fail('FAILED_PRECONDITION: Queued resource has nodes')
  kill(resource)
  shutil.rmtree(resource['born'])  # what lay on its disks alone
  resource['state'] = 'DELETING'
  write(name, resource)


def kill(resource):
  """Ends whatever runs on the workers, with its power supply."""
  mark = f'FAKE_BORN={resource["born"]}'.encode()
  found = True
  while found:
    found = False
    for process in pathlib.Path('/proc').glob('[0-9]*'):
      with contextlib.suppress(OSError):
        if mark in (process / 'environ').read_bytes().split(b'\0'):
          os.kill(int(process.name), signal.SIGKILL)
          state = (process / 'stat').read_text().rpartition(')')[2].split()[0]
          found |= state != 'Z'
    time.sleep(0.05)


def workers(resource, flags):
  """(home, environment) of the workers that the flags mean."""
  n, slices = resource['workers'], resource['slices']
  for i in range(n * slices):
    at, node = i % n, i // n
    if flags.get('worker', '0') not in ('all', str(at)):
      continue
    if flags.get('node', '0') not in ('all', str(node)):
      continue
    home = pathlib.Path(resource['born']) / f'worker{i}'
    several = slices > 1
    yield (
      home,
      {
        **os.environ,
        'HOME': str(home),
        'FAKE_BORN': resource['born'],
        'JAX_FORCE_TPU_INIT': '1',  # as if there were chips
        'JAX_PLATFORMS': 'cpu',
        'JAX_COORDINATOR_PORT': str(resource['port']),
        'TPU_WORKER_HOSTNAMES': ','.join(['127.0.0.1'] * n),
        'TPU_WORKER_ID': str(at),
        'MEGASCALE_COORDINATOR_ADDRESS': '127.0.0.1:9915' if several else '',
        'MEGASCALE_NUM_SLICES': str(slices) if several else '',
        'MEGASCALE_SLICE_ID': str(node) if several else '',
      },
    )


def reach(name):
  resource = read(name)
  if not resource:
    fail(f'NOT_FOUND: Resource {name} was not found')
  if resource['state'] != 'ACTIVE':
    fail('ssh: connect to host 10.0.0.2 port 22: Connection timed out', 255)
  return resource


def scp(positional, flags):
  source, target = positional
  name, _, path = target.partition(':')
  for home, _ in workers(reach(name), flags):
    shutil.copy(source, home / path)


def ssh(name, flags):
  """All at once; the status of the first that fails, as the real one."""
  several = 'all' in (flags.get('worker'), flags.get('node'))
  if several and flags.get('batch-size') != 'all':
    fail('this fake wants --batch-size=all, since workers must not take turns')
  if several and 'command' not in flags:
    fail('cannot target multiple workers without the `--command` flag', 2)
  # gcloud splits the command at blanks, and ssh joins it again.
  command = ' '.join(flags['command'].split(' '))
  running = [
    subprocess.Popen(['bash', '-c', command], cwd=home, env=environment)
    for home, environment in workers(reach(name), flags)
  ]
  statuses = [0] * len(running)

  def wait(i):
    statuses[i] = running[i].wait()

  threads = [
    threading.Thread(target=wait, args=(i,)) for i in range(len(running))
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  status = next((s for s in statuses if s), 0)
  sys.exit(status if status >= 0 else 255)  # the connection is lost


def preempt(name, look_alive):
  resource = read(name)
  resource['state'] = 'ACTIVE' if look_alive else 'SUSPENDING'
  if look_alive:
    resource['looks_alive'] = 1
  write(name, resource)
  kill(resource)


def main():
  arguments = sys.argv[1:]
  if arguments[:1] == ['preempt']:
    return preempt(arguments[1], '--look_alive' in arguments)
  with (CLOUD / 'calls').open('a') as file:
    file.write(shlex.join(arguments) + '\n')
  if os.environ.get('FAKE_OUTAGE') and 'describe' in arguments:
    looks = (CLOUD / 'calls').read_text().count('describe')
    if looks % 2:  # every other time
      fail('Could not reach the server')
  if arguments[:4] == ['compute', 'tpus', 'tpu-vm', 'describe']:
    positional, _ = parse('describe', arguments[4:])
    return describe_node(positional[0])
  if arguments[:3] != ['compute', 'tpus', 'queued-resources']:
    fail(f'this fake does not know: {shlex.join(arguments)}')
  verb = arguments[3]
  positional, flags = parse(verb, arguments[4:])
  if verb == 'create':
    create(positional[0], flags)
  elif verb == 'describe':
    describe(positional[0])
  elif verb == 'delete':
    delete(positional[0], flags)
  elif verb == 'scp':
    scp(positional, flags)
  elif verb == 'ssh':
    ssh(positional[0], flags)


if __name__ == '__main__':
  main()
