//! Addresses of networks and of network cards.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::{Read, put, wrong};
use crate::error::Result;

/// Family, bits of the mask, whether it is a cidr, length, address.
pub(super) fn inet(out: &mut Vec<u8>, read: &mut Read<'_>) -> Result<()> {
    const V4: u8 = 2;
    const V6: u8 = 3;
    let (family, bits, is_cidr, len) = (read.u8()?, read.u8()?, read.u8()?, read.u8()?);
    let address = read.take(usize::from(len))?;
    let most = match (family, address) {
        (V4, &[a, b, c, d]) => {
            put(out, Ipv4Addr::new(a, b, c, d));
            32
        }
        (V6, address) => {
            let bytes: [u8; 16] = address.try_into().map_err(|_| wrong("inet"))?;
            // The server writes the last four bytes of such an address as IPv4.
            match bytes {
                [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d] if (a, b) != (0, 0) => {
                    put(out, format_args!("::{}", Ipv4Addr::new(a, b, c, d)));
                }
                _ => put(out, Ipv6Addr::from(bytes)),
            }
            128
        }
        _ => return Err(wrong("inet")),
    };
    if is_cidr != 0 || bits != most {
        put(out, format_args!("/{bits}"));
    }
    Ok(())
}

/// `08:00:2b:01:02:03`, of six bytes or eight.
pub(super) fn mac(out: &mut Vec<u8>, bytes: &[u8]) {
    put(out, bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(":"));
}
