"""Secrets for the broker, read anew for every connection, so that rotated ones are picked up."""

from __future__ import annotations

import ssl

from edge_agent.errors import TransientError, from_os_error
from edge_agent.settings import MqttSettings


def password(settings: MqttSettings) -> str | None:
    """The broker's password; None where none is configured.

    Raises:
        TransientError: ``mqtt.password_file``.
    """
    if settings.password_file is not None:
        try:
            return settings.password_file.read_text("utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            # A missing file may come back.
            raise TransientError("mqtt.password_file", f"cannot read {settings.password_file}: {error}") from error
    return None if settings.password is None else settings.password.get_secret_value()


def tls_context(settings: MqttSettings) -> ssl.SSLContext:
    """Server verification, and the client's certificate where one is configured.

    Raises:
        TransientError: ``mqtt.tls_files``.
    """
    try:
        context = ssl.create_default_context(cafile=settings.ca_file)
        if settings.cert_file is not None:
            # An empty password makes an encrypted key an error; without one OpenSSL would ask on the terminal.
            context.load_cert_chain(settings.cert_file, settings.key_file, password="")
    except ssl.SSLError as error:
        raise TransientError("mqtt.tls_files", f"certificate or key cannot be used: {error}") from error
    except OSError as error:
        mapped = from_os_error(error, "reading certificates")
        raise TransientError("mqtt.tls_files", mapped.detail) from error
    return context
