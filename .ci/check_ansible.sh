#!/bin/sh
# Lints and parses ansible/. Usage: check_ansible.sh BIN (where ansible-lint and ansible-playbook are)
set -eu
bin=$(cd "$1" && pwd)
cd "$(dirname "$0")/../ansible"
# ansible-lint calls ansible by name.
PATH=$bin:$PATH
# Ansible refuses to start where the locale is not UTF-8, as in a bare container.
export PATH LC_ALL=C.UTF-8 ANSIBLE_NOCOWS=1 ANSIBLE_LOCALHOST_WARNING=False
ansible-lint --offline --strict -q
ansible-playbook -i inventory.example --syntax-check site.yml
