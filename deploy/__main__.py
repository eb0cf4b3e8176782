"""The `edge-deploy` command: keys, registry, releases, desired state, and the demo."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from datetime import datetime

from deploy.arguments import parser
from deploy.broker import BrokerAddress
from edge_agent.errors import EdgeError

OK, FAILED, INTERRUPTED = 0, 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; None takes them from the process.

    Returns:
        0 when it worked, 1 when it failed; wrong usage exits 2 from argparse.
    """
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        return COMMANDS[options.command](options)
    except EdgeError as error:
        sys.stderr.write(f"edge-deploy: {error}\n")
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left (`| head`); say nothing more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _keys_init(options: argparse.Namespace) -> int:
    from deploy.keys import ALL_SIGNERS, init_keys

    keys = init_keys(options.directory)
    if options.json:
        _print_json({"directory": str(keys.directory), "trust": str(keys.trust_dir), "keys": list(ALL_SIGNERS)})
        return OK
    print(f"private keys   {keys.directory}/private   ({', '.join(ALL_SIGNERS)})")
    print(f"for devices    {keys.trust_dir}   (root.json, desired.pem, publisher.pem)")
    print("After `registry init` move root1.pem, root2.pem and targets.pem to offline media, the two roots apart.")
    return OK


def _registry_init(options: argparse.Namespace) -> int:
    from deploy.keys import Keys
    from deploy.registry import Registry

    registry = Registry(options.directory, Keys(options.keys))
    registry.init()
    return _print_expiries(registry.expiries(), options)


def _registry_refresh(options: argparse.Namespace) -> int:
    from deploy.keys import Keys
    from deploy.registry import Registry

    registry = Registry(options.directory, Keys(options.keys))
    registry.refresh(offline_roles=options.all)
    return _print_expiries(registry.expiries(), options)


def _registry_serve(options: argparse.Namespace) -> int:
    from deploy.serve import RegistryServer

    with RegistryServer(options.directory, bind=options.bind, port=options.port, quiet=options.quiet) as server:
        # The address goes to stdout and at once: whoever started us waits for it.
        print(json.dumps({"url": server.url, "pid": os.getpid()}) if options.json else server.url, flush=True)
        server.serve_forever(poll_interval=0.2)
    return OK


def _release_publish(options: argparse.Namespace) -> int:
    from deploy.keys import Keys, load_public_key_file
    from deploy.registry import Registry
    from deploy.release import publish

    keys = Keys(options.keys)
    publishers = [*keys.trusted_publishers(), *map(load_public_key_file, options.trusted_key)]
    done = publish(
        options.bundle,
        Registry(options.registry, keys),
        publishers=publishers,
        sign_with=keys.private("publisher") if options.sign else None,
    )
    if options.json:
        _print_json(done.__dict__)
    else:
        print(f"{'already published' if done.already else 'published'}  {done.release}")
        print(f"digest     {done.digest}")
        print(f"new bytes  {done.new_bytes:,} of {done.size_bytes:,}")
    return OK


def _release_list(options: argparse.Namespace) -> int:
    from deploy.keys import Keys
    from deploy.registry import Registry
    from deploy.release import list_releases, stored_bytes

    registry = Registry(options.registry, Keys(options.keys))
    releases = list_releases(registry)
    if options.json:
        _print_json([{**r.__dict__, "size_bytes": stored_bytes(registry, r)} for r in releases])
        return OK
    for release in releases:
        print(f"{release.path}  {release.digest[:12]}  {stored_bytes(registry, release):,} bytes")
    return OK


def _desired_set(options: argparse.Namespace) -> int:
    from deploy.broker import connect
    from deploy.desired import default_not_after, next_rev, send_desired
    from deploy.keys import Keys
    from deploy.registry import Registry
    from deploy.release import find_release
    from edge_agent.contract.messages import DesiredState
    from edge_agent.contract.topics import NodeTopics

    keys = Keys(options.keys)
    key = keys.private("desired")
    topics = NodeTopics(options.site, options.node)
    release = find_release(Registry(options.registry, keys), options.release)
    with connect(_broker(options)) as session:
        state = DesiredState(
            node=options.node,
            rev=options.rev or next_rev(session, topics, keys.trusted_desired()),
            release=release.path,
            digest=release.digest,
            not_after=options.not_after or default_not_after(),
            allow_downgrade=options.allow_downgrade,
            retry_bad=options.retry_bad,
            probation_decisions=options.probation_decisions,
            probation_s=options.probation_s,
        )
        send_desired(session, topics, state, key)
    if options.json:
        _print_json(state.model_dump(mode="json"))
    else:
        print(f"{topics.base}: rev {state.rev} -> {state.release} ({state.digest[:12]}), until {state.not_after}")
    return OK


def _fleet_status(options: argparse.Namespace) -> int:
    from deploy.broker import connect
    from deploy.desired import fleet

    with connect(_broker(options)) as session:
        views = fleet(session, site=options.site or "+", node=options.node or "+")
    if options.json:
        _print_json(
            [
                {
                    "site": view.topics.site,
                    "node": view.topics.node,
                    "status": view.status and view.status.model_dump(mode="json"),
                    "reported": view.reported and view.reported.model_dump(mode="json"),
                }
                for view in views
            ]
        )
        return OK
    for view in views:
        reported, active = view.reported, view.reported.active if view.reported else None
        model = f"{active.name} {active.version}" if active else "no model"
        update = f"rev {reported.rev or '-'} {reported.state}" if reported else "no report"
        fault = f"  {reported.error.code}" if reported and reported.error else ""
        state = view.status.state if view.status else "unknown"
        print(f"{view.topics.site}/{view.topics.node:20} {state:9} {model:28} {update}{fault}")
    if not views:
        sys.stderr.write("no node has left anything retained on this broker\n")
    return OK


def _demo(options: argparse.Namespace) -> int:
    from deploy.demo.story import DemoOptions, run_demo

    return run_demo(
        DemoOptions(
            seconds=options.seconds,
            json_path=options.json,
            plain=options.plain,
            bundle=options.bundle,
            broker=options.broker,
            keep=options.keep,
        )
    )


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, default=str))


def _print_expiries(expiries: dict[str, datetime], options: argparse.Namespace) -> int:
    if options.json:
        _print_json({role: when.isoformat() for role, when in expiries.items()})
    else:
        for role, when in expiries.items():
            print(f"{role:10} valid until {when:%Y-%m-%d %H:%M} UTC")
    return OK


def _broker(options: argparse.Namespace) -> BrokerAddress:
    host, port = options.broker
    return BrokerAddress(
        host, port, options.username, options.password_file, options.ca_file, protocol=options.protocol
    )


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "keys init": _keys_init,
    "registry init": _registry_init,
    "registry refresh": _registry_refresh,
    "registry serve": _registry_serve,
    "release publish": _release_publish,
    "release list": _release_list,
    "desired set": _desired_set,
    "fleet status": _fleet_status,
    "demo": _demo,
}


if __name__ == "__main__":
    sys.exit(main())
